"""What each noisy step was worth: rewards of the deterministic completions along a rollout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlt2i.credit.steps import stochastic_steps
from rlt2i.interfaces import CreditContext


class Completions(NamedTuple):
    """Rewards along B rollouts with S stochastic steps.

    Attributes:
        values: [B, S + 1]; column k is the reward of the ODE completion of the state before the k-th stochastic step,
            the last one that of the finished image. 0 for invalid rollouts.
        valid: [B] bool, every one of them could be scored.
        steps: the S stochastic steps.
    """

    values: Tensor
    valid: Tensor
    steps: tuple[int, ...]


def completions(context: CreditContext, *, of: str) -> Completions:
    """Complete and score each rollout from the state before each of its stochastic steps.

    Between stochastic steps the rollout is its own completion, so S of them tell everything. A completion from step s
    costs T - s network calls, and each one a decoding and a reward. Rollouts of a group that share their initial noise
    share their first completion.

    Raises:
        ValueError: when no step is stochastic.
    """
    steps = stochastic_steps(context, of=of, because="all completions of a deterministic rollout are its own image")
    latents, size = context.trajectory.latents, context.group_size
    columns, valid = [], context.rewards.valid
    for step in steps:
        state = latents[:, step]
        groups = state.unflatten(0, (-1, size))
        shared = bool((groups == groups[:, :1]).all())
        rows = torch.arange(0, len(state), size if shared else 1, device=state.device)
        output = context.score(context.complete(state[rows], step, rows), rows)
        repeats = len(state) // len(rows)
        columns.append(output.scores.to(state.device).float().repeat_interleave(repeats))
        valid = valid & output.valid.to(state.device).repeat_interleave(repeats)
    values = torch.stack([*columns, context.rewards.final.float()], dim=1)
    return Completions(torch.where(valid[:, None], values, 0), valid, steps)
