"""Which steps a rollout can be trained on; shared by time weights, windows and step rewards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlt2i.interfaces import CreditContext


def trained_steps(context: CreditContext) -> tuple[int, ...]:
    """The stochastic steps of the rollout, or all of them where it is deterministic (forward-process objectives)."""
    trajectory = context.trajectory
    stochastic = tuple(trajectory.stochastic.nonzero()[:, 0].tolist())
    return stochastic or tuple(range(trajectory.num_steps))


def stochastic_steps(context: CreditContext, *, of: str, because: str) -> tuple[int, ...]:
    """The steps at which noise was drawn.

    Raises:
        ValueError: when the rollout is deterministic, naming the part, the reason and the way out.
    """
    steps = tuple(context.trajectory.stochastic.nonzero()[:, 0].tolist())
    if not steps:
        raise ValueError(f"{of}: the rollout is deterministic, and {because}. Use a stochastic sampler such as SDE.")
    return steps


def at_steps(values: Tensor, steps: tuple[int, ...], num_steps: int, *, elsewhere: float) -> Tensor:
    """[N, S] values of S steps -> [N, T, 1, 1], `elsewhere` at all other steps."""
    spread = values.new_full((len(values), num_steps), elsewhere)
    spread[:, list(steps)] = values
    return spread[:, :, None, None]


def over_trained_steps(context: CreditContext, weights: Callable[..., Tensor]) -> Tensor:
    """[1, T, 1, 1] weights of the trained steps, `weights(sigmas, mask=trained)`; one elsewhere."""
    steps, trajectory = list(trained_steps(context)), context.trajectory
    trained = torch.zeros_like(trajectory.stochastic)
    trained[steps] = True
    weight = weights(trajectory.sigmas, mask=trained)
    return at_steps(weight[None, steps], tuple(steps), trajectory.num_steps, elsewhere=1.0)


def step_mask(chosen: tuple[int, ...], context: CreditContext) -> Tensor:
    """[1, T, 1, 1] bool, True at the chosen steps."""
    mask = torch.zeros(1, context.trajectory.num_steps, 1, 1, dtype=torch.bool, device=context.trajectory.sigmas.device)
    mask[:, list(chosen)] = True
    return mask
