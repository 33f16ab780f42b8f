"""Noise levels and noise of forward-process objectives, as functions of a rollout's identity."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.interfaces import UpdateContext
from rlt2i.seeds import standard_normal, uniform
from rlt2i.types import Experience


@attrs.frozen(kw_only=True)
class SigmaDraws:
    """Which noise levels a clean image is trained at.

    Attributes:
        count: draws per image and update.
        grid: "rollout" draws steps of the sampler without replacement, all but the last, as DiffusionNFT does;
            "uniform" draws sigma in [low, high], stratified, and reads the credit of the nearest sampler step.
        low, high: bounds of "uniform".
    """

    count: int = attrs.field(default=3, validator=validators.ge(1))
    grid: Literal["rollout", "uniform"] = attrs.field(
        default="uniform", validator=validators.in_(("rollout", "uniform"))
    )
    low: float = attrs.field(default=0.02, validator=validators.gt(0))
    high: float = attrs.field(default=0.98, validator=validators.le(1))

    def __attrs_post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"SigmaDraws(low={self.low}, high={self.high}): low must be below high.")

    def draw(self, experience: Experience, keys: Tensor, *, context: UpdateContext) -> tuple[Tensor, Tensor]:
        """Noise levels and the sampler steps whose credit applies there.

        Args:
            keys: [M] long; equal keys get equal draws (a shared draw of a group uses the group's identity).

        Returns:
            sigma [M, count] float32, step [M, count] long.
        """
        sigmas = experience.trajectory.sigmas
        seeds = context.seeds("sigma", keys)
        if self.grid == "uniform":
            within = uniform(seeds, (self.count,), sigmas.device)
            sigma = (
                self.low
                + (self.high - self.low) * (torch.arange(self.count, device=sigmas.device) + within) / self.count
            )
            step = (sigma[..., None] - sigmas[:-1]).abs().argmin(dim=-1)
            return sigma, step
        usable = max(1, len(sigmas) - 2)
        if self.count > usable:
            raise ValueError(
                f"SigmaDraws(count={self.count}, grid='rollout'): the sampler has {usable} usable steps. "
                f"Use count <= {usable} or more sampler steps."
            )
        order = uniform(seeds, (usable,), sigmas.device).argsort(dim=1)
        step = order[:, : self.count]
        return sigmas[step], step


def shared_noise(
    context: UpdateContext, keys: Tensor, draw: Tensor, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """[N, *shape] standard normal noise; equal (key, draw) pairs get equal noise."""
    return standard_normal(context.seeds("noise", keys, draw), shape, device)
