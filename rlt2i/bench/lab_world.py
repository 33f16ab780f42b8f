"""A linear-Gaussian policy, judged on a region of known size: small enough that theory knows the answer.

The velocity is x + sum_k theta_k b_k with K fixed random fields b_k that span all places; the reward is the mean
brightness of a region of relative area a.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs.validators import ge, le
from safetensors.torch import save_file
from torch import Tensor

from rlt2i.functional.schedules import even_sigmas
from rlt2i.interfaces import Policy, PolicySpec, Reward, RewardBatch, RewardOutput
from rlt2i.seeds import generator
from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.types import Conditioning, ImageSize, Prompts

SIDE, GRID = 8, 4
TOKENS = GRID * GRID
ORDER = (5, 10, 0, 15, 3, 12, 6, 9, 1, 14, 2, 13, 4, 11, 7, 8)
"""In which order tokens join the region: scattered, so that no place is special."""


class LinearPolicy(Policy):
    """v = x + sum_k theta_k b_k; decoded by a sigmoid.

    Args:
        fields: K, the number of parameters.
        seed: of the fields.
    """

    offers: frozenset[str] = frozenset()

    def __init__(self, fields: int, seed: int) -> None:
        self.basis = torch.randn(fields, 3, SIDE, SIDE, generator=generator("lab", seed))
        self.theta = torch.nn.Parameter(torch.zeros(fields))

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        return even_sigmas(num_steps)

    def latent_shape(self, size: ImageSize) -> tuple[int, int, int]:
        return (3, SIDE, SIDE)

    def token_grid(self, size: ImageSize) -> tuple[int, int]:
        return (GRID, GRID)

    def encode(self, prompts: Prompts) -> Conditioning:
        rows = torch.arange(len(prompts.texts)).repeat_interleave(prompts.group_size)
        return Conditioning(tensors={"none": torch.zeros(len(prompts.texts), 1)}, rows=rows)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return latents + torch.einsum("k,kchw->chw", self.theta, self.basis)

    def velocity_with_captures(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.velocity(latents, sigma, conditioning), {}

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(2 * latents)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"theta": self.theta}

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"theta": self.theta.detach().clone()}, folder / "theta.safetensors")


@attrs.frozen(kw_only=True)
class Linear(PolicySpec):
    """Loads a `LinearPolicy`.

    Attributes:
        fields: K, how many parameters move all places together.
        seed: of the fields.
    """

    fields: int = attrs.field(default=24, validator=ge(1))
    seed: int = attrs.field(default=0, validator=ge(0))

    @property
    def offers(self) -> frozenset[str]:
        return LinearPolicy.offers

    def load(self, device: torch.device | str = "cpu") -> LinearPolicy:
        return LinearPolicy(self.fields, self.seed)


@attrs.frozen(kw_only=True)
class RegionBrightness(Reward):
    """Mean brightness of some tokens of the grid, in [0, 1]; the rest of the image is not looked at.

    Attributes:
        tokens: how many of the 16; the region's area is tokens / 16.
    """

    offers = frozenset({"maps", "gradient"})
    span = (0.0, 1.0)

    tokens: int = attrs.field(default=1, validator=[ge(1), le(TOKENS)])

    def region(self) -> Tensor:
        """[SIDE, SIDE], 1 inside."""
        flat = torch.zeros(TOKENS)
        flat[list(ORDER[: self.tokens])] = 1
        cell = SIDE // GRID
        return flat.view(GRID, GRID).repeat_interleave(cell, 0).repeat_interleave(cell, 1)

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        region = self.region()
        return (images.mean(dim=1) * region).sum(dim=(1, 2)) / region.sum()

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        scores = self.score_tensor(batch.images.float() / 255, batch.prompts, batch.metadata)
        count = len(scores)
        maps = self.region().expand(count, -1, -1).contiguous() if "maps" in want else None
        return RewardOutput.all_valid(scores, maps=maps)


@attrs.frozen(kw_only=True)
class LabTask(Task):
    """Prompts without meaning: the policy does not read."""

    image_size: int = SIDE

    @property
    def provides(self) -> frozenset[str]:
        return frozenset()

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        return [TaskPrompt(text=f"group {i}") for i in range(start, start + count)]

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        return [TaskPrompt(text=f"held-out {i}") for i in range(count)]
