"""How a map of losses becomes a number: shared by every objective.

On the reverse process the batch loss is the mean over the (rollout, step) pairs that are trained; on the forward
process the mean over rollouts of the mean over their draws. Pair and draw are means over their unmasked locations. What
has no advantage is included. So neither the number of trained steps nor that of informative groups changes the step
size by accident, and a step that rollouts share, which a mask keeps once, counts as much as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from rlt2i.interfaces import UpdateContext
from rlt2i.types import Experience, Loss, StepBatch

Granularity = Literal["sample", "token", "location"]


def ratio_grid(granularity: Granularity, experience: Experience) -> tuple[int, int]:
    """(h, w) of a granularity: one cell, one per image token, or one per latent location."""
    if granularity == "sample":
        return (1, 1)
    if granularity == "token":
        return experience.token_grid
    height, width = experience.trajectory.latents.shape[-2:]
    return (height, width)


def on_grid(field: Tensor, grid: tuple[int, int]) -> Tensor:
    """[N, 1|h, 1|w] -> [N, *grid]: repeated where the grid is finer, averaged where it is coarser. Keeps the mean."""
    if field.shape[1:] == (1, 1):
        return field.expand(-1, *grid)
    if field.shape[1:] == grid:
        return field
    if grid[0] % field.shape[1] == 0 and grid[1] % field.shape[2] == 0:
        return interpolate(field[:, None], size=grid, mode="nearest")[:, 0]
    return adaptive_avg_pool2d(field[:, None], grid)[:, 0]


def trainable_steps(experience: Experience, *, stochastic_only: bool) -> Tensor:
    """[B, T] bool: the (rollout, step) pairs with any unmasked location.

    Args:
        stochastic_only: keep only the pairs that have a log-probability.
    """
    trajectory = experience.trajectory
    kept = experience.credit.mask.any(dim=3).any(dim=2)
    kept = kept.expand(trajectory.num_rollouts, trajectory.num_steps)
    return kept & trajectory.noisy if stochastic_only else kept


def share(trainable: Tensor, rollouts: Tensor, num_rollouts: int) -> Tensor:
    """[N] the part that each (rollout, draw) pair has in the batch mean: 1 / (B x the rollout's own draw count)."""
    return 1.0 / (num_rollouts * trainable.sum(dim=1).clamp_min(1)[rollouts].float())


def share_of_mean(
    per_pair: Tensor,
    metrics: Mapping[str, Tensor],
    steps: Tensor,
    *,
    kept: Tensor,
    rollouts: Tensor,
    context: UpdateContext,
) -> Loss:
    """A micro-batch's share of the mean over rollouts, of whose pairs each rollout's count alike.

    Args:
        per_pair: [N] losses.
        metrics: name -> [N].
        steps: [N] the step of each pair.
        kept, rollouts: as `share` takes them.
    """
    return Loss(value=(per_pair * share(kept, rollouts, context.num_rollouts)).sum(), metrics=metrics, steps=steps)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[N, h, w] -> [N]: mean over unmasked locations; 0 where none is left."""
    kept = mask.expand_as(values)
    total = torch.where(kept, values, torch.zeros_like(values)).sum(dim=(1, 2))
    return total / kept.sum(dim=(1, 2)).clamp_min(1)


def weight_and_mask(states: StepBatch, grid: tuple[int, int]) -> Tensor:
    """[N, *grid] weight, 0 at masked locations, scaled so that a plain mean over the grid is the mean over the others.

    For objectives whose formula has the mean over locations inside of something that is not linear.
    """
    weight = on_grid(states.weight, grid)
    if states.mask.shape[1:] == (1, 1):  # pairs are drawn from what is not masked
        return weight
    kept = (on_grid(states.mask.float(), grid) > 0).to(weight.dtype)
    return weight * kept / kept.mean(dim=(1, 2), keepdim=True).clamp_min(1e-12)
