"""One denoising step under some weights, and its log-ratio on a grid: what objectives on the reverse process share."""

from __future__ import annotations

from typing import NamedTuple

import attrs
import torch
from torch import Tensor

from rlt2i.captures import NEGATIVE
from rlt2i.functional.surrogate import SurrogateLoss, pool_log_ratio
from rlt2i.functional.transitions import Transition
from rlt2i.interfaces import Policy, UpdateContext
from rlt2i.objectives.reduction import masked_mean, on_grid
from rlt2i.types import StepBatch, Trajectory

NO_LIKELIHOOD = {
    "noise": "Use a stochastic sampler such as SDE(...), or a forward-process objective such as DiffusionNFT()."
}
"""The way out for an objective on log-probabilities and a sampler without any."""


@attrs.frozen(kw_only=True, eq=False)
class Step:
    """The denoising steps of N (rollout, step) pairs.

    Attributes:
        velocity: [N, C, H, W].
        transition: the Gaussian steps that it makes.
    """

    velocity: Tensor
    transition: Transition


def denoising_step(policy: Policy, trajectory: Trajectory, states: StepBatch, *, again: bool = False) -> Step:
    """The steps that the policy takes from the states of `states`; gradients flow.

    Args:
        again: whether these are still the weights that rolled out; then what the rollout recorded is used.
    """
    at = (states.latents, states.sigma, states.conditioning)
    recorded = {k: v[states.rollouts, states.steps] for k, v in trajectory.captures.items() if k == NEGATIVE}
    velocity = policy.velocity_again(*at, recorded) if again and recorded else policy.velocity(*at)
    transition = trajectory.transition(states.latents, velocity, states.sigma, states.sigma_next)
    return Step(velocity=velocity, transition=transition)


def old_transition(
    policy: Policy, trajectory: Trajectory, states: StepBatch, now: Step, context: UpdateContext
) -> Transition:
    """The steps of the policy that collected the data, without gradient.

    They are made again under the set "old", which an objective without `old_decay` keeps equal to that policy, instead
    of being stored: T means per rollout are as much memory as the trajectory. On policy they are the steps `now`, bit
    for bit, so that ratios are 1 and divergences 0.
    """
    if context.on_policy:
        return Transition(now.transition.mean.detach(), now.transition.std, now.transition.scale)
    with torch.no_grad(), context.weights("old"):
        return denoising_step(policy, trajectory, states).transition


class Pooled(NamedTuple):
    """A map at the grid of the ratio.

    Attributes:
        values: [N, *grid].
        weight: [1|N, 1|h, 1|w], what is left of the credit's weight for the loss.
        noise: [1|N, 1|h, 1|w], how much noisier a cell is than its plain mean: the root of the mean squared weight that
            went inside. Clip ranges are stated for a plain mean, and grow by it.
    """

    values: Tensor
    weight: Tensor
    noise: Tensor


def at_ratio_grid(values: Tensor, states: StepBatch, grid: tuple[int, int]) -> Pooled:
    """Pool a map to the grid of the ratio; weight and mask go inside the pool where they are finer than the grid.

    Args:
        values: [N, H, W] log-ratios or errors.
        states: with weight and mask, [N, 1|h, 1|w].
        grid: (h, w) of the ratio.
    """
    size = (values.shape[1], values.shape[2])
    weight, inside = on_grid(states.weight, grid), None
    if _finer(states.weight, grid):
        inside, weight = on_grid(states.weight, size), values.new_ones(1, 1, 1)
    if _finer(states.mask, grid):
        kept = on_grid(states.mask.float(), size)
        kept = kept / on_grid(pool_log_ratio(kept, grid), size).clamp_min(1e-12)
        inside = kept if inside is None else inside * kept
    if inside is None:
        return Pooled(pool_log_ratio(values, grid), weight, values.new_ones(1, 1, 1))
    return Pooled(pool_log_ratio(inside * values, grid), weight, pool_log_ratio(inside**2, grid).sqrt())


def whole_sample(values: Tensor, states: StepBatch) -> Tensor:
    """[N, 1, 1] plain mean of a map [N, H, W] over unmasked places, without the credit's weight."""
    unweighted = attrs.evolve(states, weight=values.new_ones(1, 1, 1))
    return at_ratio_grid(values, unweighted, (1, 1)).values


def surrogate_metrics(surrogate: SurrogateLoss, log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """[N] observations of a surrogate: how far the ratios are from 1, and how often each side is held back."""
    return {
        "ratio/abs_minus_one_max": (surrogate.ratio - 1).abs().amax(dim=(1, 2)),
        "ratio/abs_log": log_ratio.detach().abs().mean(dim=(1, 2)),
        "clip/high": masked_mean(surrogate.clipped_high.float(), mask),
        "clip/low": masked_mean(surrogate.clipped_low.float(), mask),
    }


def _finer(field: Tensor, grid: tuple[int, int]) -> bool:
    return field.shape[1] > grid[0] or field.shape[2] > grid[1]
