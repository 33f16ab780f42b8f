"""A policy small enough to learn in seconds: one convolution per prompt-free image, decoded by a sigmoid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from rlt2i.functional.schedules import even_sigmas
from rlt2i.interfaces import Policy, PolicySpec, Reward, RewardBatch, RewardOutput
from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.types import Conditioning, Prompts

SIDE = 8
CAPTURE = "attention/image_to_text/0"


class ToyPolicy(Policy):
    """v = x + a learned image + a small convolution of x. Captures a fixed ramp as its "attention"."""

    offers = frozenset({CAPTURE, "attention/image_to_text/middle"})

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.network = nn.Conv2d(3, 3, 3, padding=1)
        nn.init.normal_(self.network.weight, std=0.02)
        nn.init.zeros_(self.network.bias)
        self.image = nn.Parameter(torch.zeros(1, 3, SIDE, SIDE))

    def sigmas(self, num_steps: int, image_size: int) -> Tensor:
        return even_sigmas(num_steps)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        return (3, SIDE, SIDE)

    def token_grid(self, image_size: int) -> tuple[int, int]:
        return (SIDE // 2, SIDE // 2)

    def encode(self, prompts: Prompts) -> Conditioning:
        rows = torch.arange(len(prompts.texts)).repeat_interleave(prompts.group_size)
        return Conditioning(tensors={"none": torch.zeros(len(prompts.texts), 1)}, rows=rows)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        assert len(latents) == len(sigma) == len(conditioning)
        return latents + self.image + self.network(latents)

    def velocity_with_captures(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        height, width = self.token_grid(SIDE)
        # Depends on the state, as real attention does; two concepts.
        pooled = torch.nn.functional.adaptive_avg_pool2d(latents, (height, width)).mean(dim=1).exp()
        maps = torch.stack([pooled, pooled.flip(-1)], dim=1).detach()
        return self.velocity(latents, sigma, conditioning), dict.fromkeys(names, maps)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(2 * latents)

    def encode_images(self, images: Tensor) -> Tensor:
        return torch.logit(images, eps=1 / 255) / 2

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {"image": self.image, **dict(self.network.named_parameters())}

    def export(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.detach().contiguous() for k, v in self.trainable_parameters().items()}, folder / "toy.safetensors"
        )


@attrs.frozen(kw_only=True)
class ToySpec(PolicySpec):
    """Loads a `ToyPolicy`."""

    seed: int = 0

    @property
    def offers(self) -> frozenset[str]:
        return ToyPolicy.offers

    def load(self, device: torch.device | str = "cpu") -> ToyPolicy:
        return ToyPolicy(self.seed)


@attrs.frozen(kw_only=True)
class QuadrantBrightness(Reward):
    """How much brighter the top left quadrant is than the rest, in [0, 1]."""

    offers = frozenset({"maps", "regions", "gradient"})
    span = (0.0, 1.0)

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        brightness = images.mean(dim=1)
        half = brightness.shape[-1] // 2
        inside = brightness[:, :half, :half].mean(dim=(1, 2))
        outside = (brightness.sum(dim=(1, 2)) - brightness[:, :half, :half].sum(dim=(1, 2))) / (3 * half * half)
        return (inside - outside + 1) / 2

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        scores = self.score_tensor(batch.images.float() / 255, batch.prompts, batch.metadata)
        maps = torch.zeros_like(batch.images[:, 0].float())
        half = maps.shape[-1] // 2
        maps[:, :half, :half] = 1
        valid = torch.ones(len(scores), dtype=torch.bool)
        return RewardOutput(
            scores=scores, valid=valid, components={"strict": scores}, maps=maps if "maps" in want else None
        )


@attrs.frozen(kw_only=True)
class ToyTask(Task):
    """Prompts that all ask for the same."""

    @property
    def provides(self) -> frozenset[str]:
        return frozenset()

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        return [TaskPrompt(text=f"bright corner {i % 3}", core=("corner",)) for i in range(start, start + count)]

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        return [TaskPrompt(text=f"bright corner {i % 3}", core=("corner",)) for i in range(count)]
