"""Credit contexts made by hand: a reward per rollout, random latents, and completions that can be redone on paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from rlt2i.functional.schedules import even_sigmas
from rlt2i.interfaces import CreditContext, RewardGradient, RewardOutput
from rlt2i.samplers.kernels import FlowSDE
from rlt2i.types import Conditioning, Prompts, Region, Rewards, Trajectory

SIDE = 4
"""Latents are 4 x 4 with 2 channels, image tokens 2 x 2."""


def make_context(
    rewards: Sequence[float] | Tensor,
    *,
    group_size: int,
    valid: Sequence[bool] | None = None,
    terms: Mapping[str, Sequence[float]] | None = None,
    regions: Sequence[Sequence[Region]] | None = None,
    num_steps: int = 4,
    stochastic: Sequence[int] = (0, 1, 2),
    latents: Tensor | None = None,
    completed: Callable[[int, Tensor], Tensor] | None = None,
    iteration: int = 0,
    seed: int = 0,
) -> CreditContext:
    """A context whose finished images have the given rewards.

    Args:
        completed: (step, rollouts) -> reward of the completion from that step; None takes the mean of the first channel
            of the state's top left token.
    """
    final = torch.as_tensor(rewards, dtype=torch.float32)
    count = len(final)
    draw = torch.Generator().manual_seed(seed)
    if latents is None:
        latents = torch.randn(count, num_steps + 1, 2, SIDE, SIDE, generator=draw)
    predictions = torch.randn(count, num_steps, 2, SIDE, SIDE, generator=draw)
    groups = count // group_size
    flags = torch.zeros(num_steps, dtype=torch.bool)
    flags[list(stochastic)] = True
    trajectory = Trajectory(
        latents=latents,
        sigmas=even_sigmas(num_steps),
        log_probs=torch.zeros(count, num_steps, SIDE, SIDE),
        stochastic=flags,
        kernel=FlowSDE(),
        conditioning=Conditioning(
            tensors={"none": torch.zeros(groups, 1)}, rows=torch.arange(groups).repeat_interleave(group_size)
        ),
        group_size=group_size,
        captures={"clean_predictions": predictions},
    )
    asked: list[int] = []

    def complete(states: Tensor, step: int, rollouts: Tensor) -> Tensor:
        asked.append(step)
        if completed is None:
            return states
        return completed(step, rollouts).float()[:, None, None, None].expand_as(states)

    def score(finished: Tensor, rollouts: Tensor) -> RewardOutput:
        scores = finished[:, 0, : SIDE // 2, : SIDE // 2].mean(dim=(1, 2))
        return RewardOutput(scores=scores, valid=torch.isfinite(scores))

    def reward_gradient(finished: Tensor, rollouts: Tensor) -> RewardGradient:
        return RewardGradient(scores=finished.square().sum(dim=(1, 2, 3)) / 2, gradient=finished)

    return CreditContext(
        prompts=Prompts.of([f"prompt {i}" for i in range(groups)], group_size=group_size),
        trajectory=trajectory,
        rewards=Rewards(
            values=final[:, None],
            valid=torch.ones(count, dtype=torch.bool) if valid is None else torch.tensor(valid),
            terms={name: torch.tensor(values) for name, values in (terms or {}).items()},
            scored_steps=(num_steps,),
            regions=None if regions is None else tuple(tuple(row) for row in regions),
        ),
        token_grid=(SIDE // 2, SIDE // 2),
        images=(torch.rand(count, 3, 16, 16, generator=draw) * 255).to(torch.uint8),
        iteration=iteration,
        keys=torch.arange(count) + 1000 * seed,
        generator=torch.Generator().manual_seed(seed),
        score=score,
        reward_gradient=reward_gradient,
        complete=complete,
    )


def permuted(context: CreditContext, order: Tensor) -> CreditContext:
    """The same batch with its rollouts in another order, in which groups stay together."""
    rewards, rows = context.rewards, order.tolist()
    sampled = attrs.evolve(context.trajectory.take(order), group_size=context.group_size)
    return attrs.evolve(
        context,
        trajectory=sampled,
        rewards=attrs.evolve(
            rewards,
            values=rewards.values[order],
            valid=rewards.valid[order],
            terms={name: term[order] for name, term in rewards.terms.items()},
            regions=None if rewards.regions is None else tuple(rewards.regions[i] for i in rows),
        ),
        images=context.images[order],
        keys=context.keys[order],
        generator=torch.Generator().manual_seed(0),
    )
