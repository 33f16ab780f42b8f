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
        grid: "uniform" draws sigma in [low, high], stratified, and reads the credit of the nearest sampler step;
            "rollout" draws sampler steps without replacement, as DiffusionNFT and DGPO do; "stratified" draws one
            sampler step in each of `count` equal ranges, as AWM does.
        low, high: bounds of "uniform"; nothing is drawn above the first noise level of the rollout, since a model whose
            schedule starts below 1 knows nothing of noisier states.
        steps: (first, last), last exclusive, the sampler steps to draw from; None stands for all but the last.
    """

    count: int = attrs.field(default=3, validator=validators.ge(1))
    grid: Literal["rollout", "stratified", "uniform"] = attrs.field(
        default="uniform", validator=validators.in_(("rollout", "stratified", "uniform"))
    )
    low: float = attrs.field(default=0.02, validator=validators.gt(0))
    high: float = attrs.field(default=0.98, validator=validators.le(1))
    steps: tuple[int, int] | None = None

    def __attrs_post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"SigmaDraws(low={self.low}, high={self.high}): low must be below high.")
        if self.steps is None:
            return
        if self.grid == "uniform":
            raise ValueError(
                f"SigmaDraws(steps={self.steps}, grid='uniform'): uniform draws are bounded by low and high. "
                "Use grid='rollout' or 'stratified' to draw sampler steps."
            )
        if not 0 <= self.steps[0] < self.steps[1]:
            raise ValueError(f"SigmaDraws(steps={self.steps}): 0 <= first < last must hold, last exclusive.")

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
            high = min(self.high, float(sigmas[0]))
            sigma = (
                self.low + (high - self.low) * (torch.arange(self.count, device=sigmas.device) + within) / self.count
            )
            step = (sigma[..., None] - sigmas[:-1]).abs().argmin(dim=-1)
            return sigma, step
        first, last = self._range(len(sigmas) - 1)
        if self.grid == "stratified":
            bounds = torch.linspace(first, last, self.count + 1, device=sigmas.device).long()
            within = uniform(seeds, (self.count,), sigmas.device)
            step = bounds[:-1] + (within * bounds.diff()).long()
        else:
            order = uniform(seeds, (last - first,), sigmas.device).argsort(dim=1)
            step = first + order[:, : self.count]
        return sigmas[step], step

    def _range(self, num_steps: int) -> tuple[int, int]:
        first, last = self.steps or (0, max(1, num_steps - 1))
        if last > num_steps:
            raise ValueError(
                f"SigmaDraws(steps={self.steps}): the sampler has {num_steps} steps. Use last <= {num_steps}."
            )
        if self.grid == "rollout" and self.count > last - first:
            raise ValueError(
                f"SigmaDraws(count={self.count}, grid='rollout'): the sampler has {last - first} usable steps. "
                f"Use count <= {last - first} or more sampler steps."
            )
        return first, last


def shared_noise(
    context: UpdateContext, keys: Tensor, draw: Tensor, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """[N, *shape] standard normal noise; equal (key, draw) pairs get equal noise."""
    return standard_normal(context.seeds("noise", keys, draw), shape, device)
