"""Qwen-Image-2.1: one stream of [text; image] in which text never looks at the image and always has t = 0.

Qwen-Image-2.1 (7B) is open, under the Qwen Research licence, which is non-commercial. Its default is no guidance. The
numbers of `data/qwen_image21.json` are those that several public ports quote of its configuration; they make 7.12 B.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from rlt2i.functional.transfer import to_device
from rlt2i.policies.attention.maps import Where
from rlt2i.policies.pretrained import DATA, PretrainedPolicy, PretrainedSpec, in_template
from rlt2i.policies.token_spans import Characters
from rlt2i.types import Conditioning, ImageSize

_LONGEST = 4096
"""Tokens of a text; its rotary embedding has positions for twice as many."""


@attrs.frozen(kw_only=True, eq=False)
class QwenImage21Policy(PretrainedPolicy):
    """A loaded Qwen-Image-2.1."""

    spec: QwenImage21
    patch: ClassVar = 1
    order: ClassVar = "cross"  # of the image: text asks in a call of its own, which `Where.keys` leaves out
    tokenizer: ClassVar = "processor"

    def __attrs_post_init__(self) -> None:
        self.network.forward = types.MethodType(_forward, self.network)

    @property
    def granularity(self) -> int:
        return 2 * self.pixels_per_latent

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        """The levels that the pipeline's author has set, where they are as many as asked for; else evenly many."""
        h, w = self.token_grid(size)
        own = self.pipe.config.sample_sigmas
        levels = own if own is not None and len(own) == num_steps else None
        return self.scheduler_sigmas(num_steps, mu=self.shift_of(h * w), levels=levels)

    @property
    def text_length(self) -> int:
        return self.spec.max_sequence_length + int(self.pipe._drop_idx)

    def written(self, text: str) -> tuple[str, int]:
        return in_template(self.pipe.prompt_template_t2i.format, text)

    def text_streams(self, text: str) -> Mapping[str, tuple[int, Sequence[Characters]]]:
        return {"text": (-int(self.pipe._drop_idx), super().text_streams(text)["text"][1])}

    def encode_text(self, text: str, *, negative: bool) -> Mapping[str, Tensor]:
        return {"embeddings": self.pipe.encode_prompt(text, device=self.device)[0][0, : self.spec.max_sequence_length]}

    def where(self, latents: Tensor, conditioning: Conditioning) -> Where:
        where = super().where(latents, conditioning)
        return attrs.evolve(where, keys=conditioning["embeddings"].shape[1] + where.grid[0] * where.grid[1])

    def predict(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.network(
            latents.flatten(2).mT,
            conditioning["embeddings"],
            (1000 * sigma).to(latents.dtype) / 1000,  # rounded as the pipeline rounds it
            grid=(latents.shape[2], latents.shape[3]),
        )
        return output.mT.unflatten(2, latents.shape[2:])

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        plain: Callable[..., Tensor] = super().velocity
        return self._by_length(lambda *rows: (plain(*rows), {}), latents, sigma, conditioning)[0]

    def velocity_with_captures(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        watched: Callable[..., tuple[Tensor, dict[str, Tensor]]] = super().velocity_with_captures
        return self._by_length(lambda *rows: watched(*rows, names), latents, sigma, conditioning)

    def _by_length(
        self, run: Callable[..., tuple[Tensor, dict[str, Tensor]]], latents: Tensor, sigma: Tensor, given: Conditioning
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rollouts pass together whose texts are as long: padding would move the image in its rotary embedding."""
        if self.text_mask(given) is None:
            return run(latents, sigma, given)
        lengths = self.text_lengths(given)
        parts, order = [], []
        for length in sorted(set(lengths)):
            own = [row for row, its in enumerate(lengths) if its == length]
            rows = to_device(torch.tensor(own), latents.device)
            tensors = {**given.tensors, "embeddings": given.tensors["embeddings"][:, :length]}
            del tensors["mask"]
            parts.append(run(latents[rows], sigma[rows], attrs.evolve(given, tensors=tensors).take(rows)))
            order += own
        back = to_device(torch.tensor(order).argsort(), latents.device)
        captures = {name: torch.cat([captured[name] for _, captured in parts])[back] for name in parts[0][1]}
        return torch.cat([velocity for velocity, _ in parts])[back], captures


def _forward(self: Any, *args: Any, grid: tuple[int, int] | None = None, **options: Any) -> Any:
    """The network's forward pass; where a grid is given, that of one image and texts as long as each other."""
    return type(self).forward(self, *args, **options) if grid is None else _one_image(self, grid, *args)


def _one_image(self: Any, grid: tuple[int, int], latents: Tensor, embeddings: Tensor, timestep: Tensor) -> Tensor:
    """The network's sums, without its questions to the device: where the image is, is known on the host.

    Args:
        grid: (h, w).
        latents: [N, h * w, C].
        embeddings: [N, L, D] of the text, without padding.
        timestep: [N] in [0, 1].

    Returns:
        [N, h * w, C].
    """
    text, image = self.txt_in(embeddings), self.img_in(latents)
    length = text.shape[1]
    joint = torch.cat([text, image], dim=1)
    is_image = torch.arange(joint.shape[1]) >= length
    table = self.pos_embed([(1, *grid)], is_image, self.pos_embed.freqs[0].device)
    rotary, is_image = to_device(table, joint.device), torch.arange(joint.shape[1], device=joint.device) >= length
    timestep = timestep.to(joint.dtype)
    embedded = self.time_text_embed(torch.cat([timestep, timestep.new_zeros(1)]), joint)  # the text's t = 0 last
    modulation = self.modulation(embedded)
    checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
    segments = [(0, length, True)]
    for block in self.transformer_blocks:
        arguments = (joint, modulation, rotary, None, is_image, None, None, None, segments, None)
        joint = self._gradient_checkpointing_func(block, *arguments) if checkpointing else block(*arguments)
    return self.proj_out(self.norm_out(joint, embedded, is_image))[:, length:]


class _NoProcessor:
    """What the pipeline asks of its processor when it is built, where there is none."""

    tokenizer: ClassVar[Any] = types.SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, messages: Any, **options: Any) -> list[list[int]]:
        """No message has tokens."""
        return [[]]


@attrs.frozen(kw_only=True)
class QwenImage21(PretrainedSpec):
    """A Qwen-Image-2.1 pipeline to train.

    Attributes:
        max_sequence_length: tokens of the prompt and of its template's end; its pipeline has no limit.
    """

    path: str = attrs.field(default="Qwen/Qwen-Image-2.1", validator=attrs.validators.min_len(1))
    max_sequence_length: int = attrs.field(
        default=512, validator=[attrs.validators.ge(1), attrs.validators.le(_LONGEST)]
    )

    pipeline: ClassVar = "QwenImage21Pipeline"
    policy: ClassVar = QwenImage21Policy
    directions: ClassVar = ("image_to_text",)
    known: ClassVar = {"Qwen/Qwen-Image-2.1": DATA / "qwen_image21.json"}
    licences: ClassVar = {"Qwen/Qwen-Image-2.1": "Qwen Research, non-commercial; open"}
    absent: ClassVar = {"processor": _NoProcessor()}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embeddings": (self.max_sequence_length, self.config("transformer")["context_in_dim"])}

    def drawing(self) -> dict[str, Any] | None:
        options = super().drawing()
        return None if options is None else {**options, "use_kv_cache": False}  # the same sums, otherwise rounded
