"""Classifier-free guidance around any policy: how a velocity and that of a negative prompt become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.captures import NEGATIVE
from rlt2i.functional.transfer import on_both, on_host, to_device, with_twin
from rlt2i.interfaces import Policy
from rlt2i.types import Conditioning, ImageSize, Prompts

_IS_NEGATIVE = "guidance/is_negative_prompt"
EXTRA = "extra/"
"""Tensors of a conditioning whose names begin so are no text: under guidance each row keeps its own."""


# ----------------------------------------------------------------------------------------------------------- formulas


class GuidanceForm(ABC):
    """The formula of guidance."""

    @property
    def neutral(self) -> float:
        """The scale at which it gives the velocity of the prompt itself."""
        return 1.0

    @abstractmethod
    def combine(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """[N, C, H, W] from the velocities of the prompt and of the negative prompt; gradients flow."""

    def active(self, sigma: Tensor) -> Tensor | None:
        """[N] bool, the rows that are guided at these levels; None is all of them."""
        return None


@attrs.frozen(kw_only=True)
class LinearGuidance(GuidanceForm):
    """v_neg + scale (v_pos - v_neg) (Ho and Salimans, arXiv 2207.12598)."""

    def combine(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return negative + scale * (positive - negative)


@attrs.frozen(kw_only=True)
class OffsetGuidance(GuidanceForm):
    """v_pos + scale (v_pos - v_neg), as Z-Image and Krea count their scale: linear guidance of 1 + scale."""

    @property
    def neutral(self) -> float:
        return 0.0

    def combine(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return positive + scale * (positive - negative)


@attrs.frozen(kw_only=True)
class RescaledGuidance(GuidanceForm):
    """A guided velocity brought back to the norm of v_pos.

    Attributes:
        of: the formula whose result is rescaled.
        over: what a norm is taken of: an image "token" (all channels of its patch, Qwen-Image), a "row" of latents in
            one channel (Lumina-2), or the whole "image" (Z-Image).
        patch: latents per side of a token.
        limit: None always restores the norm of v_pos; otherwise a norm is only cut to `limit` times that of v_pos.
    """

    of: GuidanceForm = attrs.field(factory=LinearGuidance)
    over: Literal["token", "row", "image"] = attrs.field(
        default="token", validator=validators.in_(("token", "row", "image"))
    )
    patch: int = attrs.field(default=2, validator=validators.ge(1))
    limit: float | None = attrs.field(default=None, validator=validators.optional(validators.gt(0)))

    @property
    def neutral(self) -> float:
        return self.of.neutral

    def combine(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        combined = self.of.combine(positive, negative, scale)
        factor = self._norm(positive) / self._norm(combined)
        if self.limit is not None:
            factor = (self.limit * factor).clamp(max=1)
        return combined * factor

    def active(self, sigma: Tensor) -> Tensor | None:
        return self.of.active(sigma)

    def _norm(self, velocity: Tensor) -> Tensor:
        """Norms, shaped to multiply a velocity."""
        if self.over == "row":
            return torch.linalg.vector_norm(velocity, dim=-1, keepdim=True)
        if self.over == "image":
            return torch.linalg.vector_norm(velocity, dim=(1, 2, 3), keepdim=True)
        n, c, h, w = velocity.shape
        p = self.patch
        tokens = velocity.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3)
        norms = torch.linalg.vector_norm(tokens, dim=-1)
        return norms.repeat_interleave(p, dim=1).repeat_interleave(p, dim=2)[:, None]


@attrs.frozen(kw_only=True)
class IntervalGuidance(GuidanceForm):
    """Guidance at some noise levels only (Kynkaanniemi et al., arXiv 2404.07724); truncation is an interval too.

    Outside of it, where no row of a batch is inside, the negative prompt costs nothing.

    Attributes:
        low, high: guided where low <= sigma <= high.
        of: the formula inside.
    """

    low: float = attrs.field(default=0.0, validator=[validators.ge(0), validators.le(1)])
    high: float = attrs.field(default=1.0, validator=[validators.ge(0), validators.le(1)])
    of: GuidanceForm = attrs.field(factory=LinearGuidance)

    def __attrs_post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(
                f"IntervalGuidance(low={self.low:g}, high={self.high:g}): nothing lies between; sigma falls from 1 to "
                "0 in a rollout, so guide early steps with low=0.6, high=1.0."
            )

    @property
    def neutral(self) -> float:
        return self.of.neutral

    def combine(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return self.of.combine(positive, negative, scale)

    def active(self, sigma: Tensor) -> Tensor:
        sigma = on_host(sigma)  # whether any row is guided is a question of the host
        inside = (sigma >= self.low) & (sigma <= self.high)
        within = self.of.active(sigma)
        return inside if within is None else inside & within


# ------------------------------------------------------------------------------------------------------------- policy


@attrs.frozen(kw_only=True, eq=False)
class Guided(Policy):
    """A policy under guidance; captures come from the prompt's own pass.

    Both prompts run in passes of their own, of the same N rows, with gradient and without: so a rollout, its replay
    and an update compute every number in the same geometry, whatever the kernels do.

    Attributes:
        policy: the policy without guidance.
        scale: of the form; at `form.neutral` it is the policy itself.
        form: the formula.
        negative_prompt: usually empty.
        uncond_grad: whether gradients flow through the negative prompt's pass; without, its activations are not kept,
            which halves the memory of the backward pass.
        reuse_negative: where it has no gradient, let rollouts record it, so that the first optimizer step on them,
            under the same weights, need not compute it again; it takes as much memory as the latents.
    """

    policy: Policy
    scale: float
    form: GuidanceForm = attrs.field(factory=LinearGuidance)
    negative_prompt: str = ""
    uncond_grad: bool = False
    reuse_negative: bool = True

    @property
    def offers(self) -> frozenset[str]:
        recorded = self.reuse_negative and not self.uncond_grad and self.scale != self.form.neutral
        return self.policy.offers | ({NEGATIVE} if recorded else frozenset())

    def encode(self, prompts: Prompts) -> Conditioning:
        """The prompts' rows, then one of the negative prompt that no rollout refers to."""
        if self.scale == self.form.neutral:
            return self.policy.encode(prompts)
        encoded = self.policy.encode_with_negative(prompts, self.negative_prompt)
        is_negative = on_both(torch.arange(len(prompts.texts) + 1) == len(prompts.texts), encoded.rows.device)
        return attrs.evolve(encoded, tensors={**encoded.tensors, _IS_NEGATIVE: is_negative})

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if self.scale == self.form.neutral:
            return self.policy.velocity(latents, sigma, conditioning)
        return self._guide(self.policy.velocity(latents, sigma, conditioning), latents, sigma, conditioning)[0]

    def velocity_again(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, recorded: Mapping[str, Tensor]
    ) -> Tensor:
        if NEGATIVE not in recorded:
            return self.velocity(latents, sigma, conditioning)
        return self._combined(self.policy.velocity(latents, sigma, conditioning), recorded[NEGATIVE], sigma)

    def velocity_with_captures(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        inner = names - {NEGATIVE}
        positive, captures = (
            self.policy.velocity_with_captures(latents, sigma, conditioning, inner)
            if inner
            else (self.policy.velocity(latents, sigma, conditioning), {})
        )
        if self.scale == self.form.neutral:
            return positive, captures
        guided, negative = self._guide(positive, latents, sigma, conditioning)
        return guided, captures | ({NEGATIVE: negative.detach()} if NEGATIVE in names else {})

    def _guide(
        self, positive: Tensor, latents: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """The guided velocity and that of the negative prompt, 0 where no row asks for it."""
        active = self.form.active(sigma)
        if active is not None and not bool(active.any()):
            return positive, torch.zeros_like(positive)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.uncond_grad):
            negative = self.policy.velocity(latents, sigma, self._negative(conditioning))
        return self._combined(positive, negative, sigma), negative

    def _combined(self, positive: Tensor, negative: Tensor, sigma: Tensor) -> Tensor:
        active = self.form.active(sigma)
        guided = self.form.combine(positive, negative, self.scale)
        if active is None:
            return guided
        return torch.where(to_device(active, guided.device)[:, None, None, None], guided, positive)

    def _negative(self, conditioning: Conditioning) -> Conditioning:
        """The negative prompt for every row, beside what else conditions that row."""
        if _IS_NEGATIVE not in conditioning.tensors:
            raise ValueError(
                "Guided: this conditioning has no negative prompt; encode the prompts with the guided policy."
            )
        is_negative = conditioning.tensors[_IS_NEGATIVE]
        row = is_negative.long().argmax()
        if not any(name.startswith(EXTRA) for name in conditioning.tensors):
            known = on_host(is_negative).long().argmax()
            rows = with_twin(row.expand(len(conditioning)), known.expand(len(conditioning)))
            return attrs.evolve(conditioning, rows=rows)
        rows = torch.arange(len(conditioning), device=conditioning.rows.device)
        tensors = {
            name: conditioning[name]
            if name.startswith(EXTRA)
            else tensor.index_select(0, row[None]).expand(len(rows), *tensor.shape[1:])  # [row] asks the device for it
            for name, tensor in conditioning.tensors.items()
        }
        return attrs.evolve(conditioning, tensors=tensors, rows=rows)

    # ------------------------------------------------------------------------------------------------- delegated

    def merged(self) -> AbstractContextManager[None]:
        return self.policy.merged()

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        return self.policy.sigmas(num_steps, size)

    def text_streams(self, text: str) -> Mapping[str, tuple[int, Sequence[tuple[int, int]]]]:
        return self.policy.text_streams(text)

    def latent_shape(self, size: ImageSize) -> tuple[int, int, int]:
        return self.policy.latent_shape(size)

    def token_grid(self, size: ImageSize) -> tuple[int, int]:
        return self.policy.token_grid(size)

    def decode(self, latents: Tensor) -> Tensor:
        return self.policy.decode(latents)

    def encode_images(self, images: Tensor) -> Tensor:
        return self.policy.encode_images(images)

    def initial_latents(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return self.policy.initial_latents(noise, sigma)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.policy.trainable_parameters()

    def export(self, folder: Path) -> None:
        self.policy.export(folder)
