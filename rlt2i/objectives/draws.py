"""Noise levels and noise of forward-process objectives, as functions of a rollout's identity."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.config import neutral
from rlt2i.functional.time_sampling import (
    Direction,
    logit_normal,
    normal_quantile,
    shift_towards,
    stratified_steps,
    stratified_times,
)
from rlt2i.functional.transfer import on_host
from rlt2i.interfaces import UpdateContext
from rlt2i.seeds import standard_normal, uniform
from rlt2i.types import Experience


@attrs.frozen(kw_only=True)
class SigmaDraws:
    """Which noise levels a clean image is trained at.

    Attributes:
        count: draws per image and update.
        grid: "uniform" draws sigma in [low, high], stratified, and reads the credit of the nearest sampler step;
            "logit_normal" draws sigmoid(mean + std z) alike, as SD3's training and AWM do; "rollout" draws sampler
            steps without replacement, as DiffusionNFT and DGPO do; "stratified" draws one sampler step in each of
            `count` equal ranges, as AWM does.
        low, high: bounds of "uniform" and "logit_normal"; nothing is drawn above the first noise level of the rollout,
            since a model whose schedule starts below 1 knows nothing of noisier states.
        steps: (first, last), last exclusive, the sampler steps to draw from; None stands for all but the last.
        mean, std: of the logit of sigma in "logit_normal"; a positive mean favours noise.
        shift: of "uniform" and "logit_normal", as that of SD3's schedule, 3 there; 1 moves nothing.
        towards: where a shift above 1 moves the draws, to "noise" (SD3, AWM) or to the "image" (Flow-Factory).
    """

    count: int = attrs.field(default=3, validator=validators.ge(1))
    grid: Literal["rollout", "stratified", "uniform", "logit_normal"] = attrs.field(
        default="uniform", validator=validators.in_(("rollout", "stratified", "uniform", "logit_normal"))
    )
    low: float = attrs.field(default=0.02, validator=validators.gt(0))
    high: float = attrs.field(default=0.98, validator=validators.le(1))
    steps: tuple[int, int] | None = None
    mean: float = neutral(0.0)
    std: float = neutral(1.0, validator=validators.gt(0))
    shift: float = neutral(1.0, validator=validators.gt(0))
    towards: Direction = neutral("noise", validator=validators.in_(("noise", "image")))

    def __attrs_post_init__(self) -> None:
        if self.grid != "logit_normal" and (self.mean, self.std) != (0, 1):
            raise ValueError(
                f"SigmaDraws(mean={self.mean}, std={self.std}, grid={self.grid!r}): they shape the logit-normal "
                "distribution. Use grid='logit_normal', or leave them out."
            )
        if self.shift != 1 and self.grid in ("rollout", "stratified"):
            raise ValueError(
                f"SigmaDraws(shift={self.shift}, grid={self.grid!r}): sampler steps are where the schedule put them. "
                "Use grid='uniform' or 'logit_normal' to move the draws."
            )
        if not self.low < self.high:
            raise ValueError(f"SigmaDraws(low={self.low}, high={self.high}): low must be below high.")
        if self.steps is None:
            return
        if self.grid in ("uniform", "logit_normal"):
            raise ValueError(
                f"SigmaDraws(steps={self.steps}, grid={self.grid!r}): these draws are bounded by low and high. "
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
        if self.grid in ("uniform", "logit_normal"):
            high = min(self.high, float(on_host(sigmas)[0]))
            sigma = self._levels(uniform(seeds, (self.count,), sigmas.device), high=high)
            step = (sigma[..., None] - sigmas[:-1]).abs().argmin(dim=-1)
            return sigma, step
        first, last = self._range(len(sigmas) - 1)
        if self.grid == "stratified":
            step = stratified_steps(uniform(seeds, (self.count,), sigmas.device), first=first, last=last)
        else:
            order = uniform(seeds, (last - first,), sigmas.device).argsort(dim=1)
            step = first + order[:, : self.count]
        return sigmas[step], step

    def _levels(self, within: Tensor, *, high: float) -> Tensor:
        """[M, count] noise levels in [low, high], from uniform numbers."""
        if self.grid == "uniform":
            sigma = stratified_times(within, low=self.low, high=high)
        else:
            sigma = logit_normal(normal_quantile(stratified_times(within)), mean=self.mean, std=self.std)
        if self.shift != 1:
            sigma = shift_towards(sigma, self.shift, self.towards)
        return sigma if (self.grid, self.shift) == ("uniform", 1) else sigma.clamp(self.low, high)

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
    """[N, *shape] standard normal noise; equal (key, draw) pairs get equal noise.

    Args:
        keys, draw: [N] long; given on the host, nobody waits for the device.
        device: of the noise.
    """
    return standard_normal(context.seeds("noise", keys, draw), shape, device)
