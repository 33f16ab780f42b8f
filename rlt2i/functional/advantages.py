"""Advantages: signed credit per rollout (and per step), before any allocation over time or space.

`group_size` is G when the rollouts of one prompt are adjacent, or [B] integer group ids. `valid` ([B] bool)
excludes failed rewards: they leave every statistic and get advantage 0. A group whose valid rewards are all
equal, up to the rounding of numbers of their size, gets exactly 0: dividing rounding noise by its own spread
would invent a preference.
"""

from typing import Literal

import torch
from torch import Tensor

from .groups import group_mask, masked_mean, masked_std, tied
from .numerics import full_precision, rounding

StdScope = Literal["group", "global"]


def group_relative_advantage(
    rewards: Tensor,
    group_size: int | Tensor,
    *,
    eps: float = 1e-4,
    min_std: float = 0.0,
    std: StdScope = "group",
    correction: int = 0,
    valid: Tensor | None = None,
    size: Tensor | None = None,
) -> Tensor:
    """Centre and scale each reward by its own prompt group (GRPO, arXiv 2402.03300; Flow-GRPO, 2505.05470).

        A_i = (r_i - mean_group) / (max(std, min_std) + eps)

    The defaults are Flow-GRPO's. Others: DanceGRPO and MixGRPO correction=1, eps=1e-8; verl-omni
    correction=1; DDPO eps=1e-6; Flow-Factory eps=0, min_std=1e-6. `std="global"` scales by the std of the
    whole batch, the mean stays per group.

    Args:
        rewards: [B] outcome rewards, or [B, T] step rewards, normalised column by column.
        group_size: G for adjacent groups, or [B] integer group ids.
        eps: added to the std.
        min_std: floor of the std.
        std: whose std to divide by.
        correction: 0 for the population std, 1 for the unbiased one.
        valid: [B] bool; see the module's text.
        size: broadcastable to `rewards`; the absolute value of the numbers whose differences the rewards are, if they
            are differences. It decides what is rounding.

    Returns:
        The shape of `rewards`, in its dtype (float32 for other than float32/64); every group has mean 0.

    Raises:
        ValueError: for an unknown `std`.
    """
    if std not in ("group", "global"):
        raise ValueError(f"std={std!r}: whose std? Use 'group' (each prompt's own) or 'global' (the whole batch's).")
    rewards = full_precision(rewards)
    groups, mask = group_mask(group_size, rewards, valid)
    split = groups.split(rewards)
    centred = split - masked_mean(split, mask, 1)
    spread = masked_std(split, mask, 1 if std == "group" else (0, 1), correction=correction)
    advantage = centred / (spread.clamp(min=min_std) + eps)
    scale = None if size is None else groups.split(size.expand_as(rewards))
    return groups.merge(torch.where(mask & ~tied(split, mask, scale), advantage, 0))


def step_gain(
    values: Tensor,
    group_size: int | Tensor,
    *,
    eps: float = 1e-4,
    std: StdScope = "group",
    valid: Tensor | None = None,
) -> Tensor:
    """Credit each step with the reward it gained, normalised in its group step by step.

        gain_t = r_{t+1} - r_t,   A_t = group-relative gain_t

    With r_t the reward of the full ODE completion of state t this is DenseGRPO (arXiv 2601.20218); with the
    reward of the one-step prediction x0_hat(t) it is Stepwise-Flow-GRPO (arXiv 2603.28718).

    Args:
        values: [B, S + 1] rewards along the trajectory, the last one of the final image.
        group_size: G for adjacent groups, or [B] integer group ids.
        eps: added to the std.
        std: whose std to divide by, per step in both cases.
        valid: [B] bool.

    Returns:
        [B, S].

    Raises:
        ValueError: for values at fewer than two points.
    """
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(
            f"values of shape {tuple(values.shape)} have no gain: a gain needs rewards at two points. "
            "Pass [B, S + 1]: the reward before every scored step and of the final image."
        )
    values = full_precision(values)
    size = torch.maximum(values[:, 1:].abs(), values[:, :-1].abs())
    return group_relative_advantage(values.diff(dim=1), group_size, eps=eps, std=std, valid=valid, size=size)


def gdpo(
    rewards: Tensor,
    weights: Tensor,
    group_size: int | Tensor,
    *,
    min_std: float = 1e-6,
    valid: Tensor | None = None,
) -> Tensor:
    """GDPO as in Flow-Factory: normalise each reward in its group, add, normalise the sum over the batch.

        s_i = sum_k w_k (r_ik - mean_group) / max(std_group, min_std)
        A_i = (s_i - mean s) / max(std s, min_std)

    Args:
        rewards: [B, K] one column per reward.
        weights: [K].
        group_size: G for adjacent groups, or [B] integer group ids.
        min_std: floor of every (population) std.
        valid: [B] bool.

    Returns:
        [B]; 0 everywhere if the sum is constant.
    """
    rewards = full_precision(rewards)
    normalised = group_relative_advantage(rewards, group_size, eps=0.0, min_std=min_std, valid=valid)
    weights = _column_weights(weights, rewards)
    total = (normalised * weights).sum(dim=1)
    # Columns that cancel leave the rounding of each of them, which is that of its rewards in units of their spread.
    groups, mask = group_mask(group_size, rewards, valid)
    split = groups.split(rewards)
    spread = masked_std(split, mask, 1, correction=0).clamp(min=min_std)
    sizes = torch.where(normalised != 0, groups.merge(split.abs() / spread), 0)
    size = (sizes * weights.abs()).sum(dim=1)
    return group_relative_advantage(total, len(total), eps=0.0, min_std=min_std, valid=valid, size=size)


def win_rate(scores: Tensor, group_size: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Share of its group that a rollout beats, ties (up to rounding) counting one half (Pref-GRPO, arXiv 2508.20751).

    Args:
        scores: [B].
        group_size: G for adjacent groups, or [B] integer group ids.
        valid: [B] bool; invalid rollouts are no opponents and get 1/2.

    Returns:
        [B] in [0, 1]; 1/2 where there is no opponent.
    """
    scores = full_precision(scores)
    groups, mask = group_mask(group_size, scores, valid)
    split = groups.split(scores)
    lead = split[:, :, None] - split[:, None, :]
    size = torch.maximum(split.abs()[:, :, None], split.abs()[:, None, :])
    beats = torch.heaviside(torch.where(lead.abs() <= rounding(size), 0, lead), split.new_tensor(0.5))
    return groups.merge(_mean_over_opponents(beats, mask))


def win_rate_advantage(
    scores: Tensor, group_size: int | Tensor, *, eps: float = 1e-4, valid: Tensor | None = None
) -> Tensor:
    """Group-relative advantage of win rates (Pref-GRPO, arXiv 2508.20751): only the group's order matters.

    Args:
        scores: [B] of a pointwise judge, or [P, G, G] preferences of a pairwise one for P adjacent groups:
            entry [p, i, j] is the probability that rollout i of group p beats rollout j (the diagonal is not
            read).
        group_size: G for adjacent groups, or (pointwise only) [B] integer group ids.
        eps: added to the std of the win rates.
        valid: [B] bool.

    Returns:
        [B].

    Raises:
        ValueError: for scores that are neither [B] nor [P, G, G] of this group size.
    """
    if scores.ndim == 1:
        rates = win_rate(scores, group_size, valid=valid)
        return group_relative_advantage(rates, group_size, eps=eps, valid=valid)
    size = scores.shape[1]
    if scores.ndim != 3 or scores.shape[2] != size or isinstance(group_size, Tensor) or group_size != size:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} with group_size={group_size} are neither pointwise nor "
            "pairwise. Pass [B] scores, or [P, G, G] preferences of adjacent groups with group_size=G."
        )
    preferences = full_precision(scores)
    _, mask = group_mask(size, preferences.new_zeros(len(scores) * size), valid)
    rates = _mean_over_opponents(preferences, mask).flatten()
    return group_relative_advantage(rates, size, eps=eps, valid=valid)


def best_of_group(rewards: Tensor, group_size: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Flow-GRPO's label for supervised fine-tuning: 1 for every rollout that ties for the best, else 0.

    Args:
        rewards: [B].
        group_size: G for adjacent groups, or [B] integer group ids.
        valid: [B] bool.

    Returns:
        [B] of 0 and 1.
    """
    rewards = full_precision(rewards)
    groups, mask = group_mask(group_size, rewards, valid)
    split = groups.split(rewards)
    best = torch.where(mask, split, -torch.inf).amax(dim=1, keepdim=True)
    return groups.merge((mask & (best - split <= rounding(best.abs()))).to(rewards.dtype))


def reward_weights(rewards: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Weights of reward-weighted regression as in Flow-GRPO: the raw reward, linear, not exp(r / tau).

    Args:
        rewards: [B].
        valid: [B] bool.

    Returns:
        [B]; invalid samples get 0.
    """
    rewards = full_precision(rewards)
    return rewards if valid is None else torch.where(valid, rewards, 0)


def recorded_preference(verdict: Tensor, group_size: int, *, valid: Tensor | None = None) -> Tensor:
    """What was said of recorded images as an advantage: the verdict itself, 0 where its group is not whole.

    Args:
        verdict: [B], +1 for the winner and -1 for the loser of a pair.
        group_size: G, the rollouts that were judged together; they are adjacent.
        valid: [B] bool.

    Returns:
        [B]; every group has the mean of its verdicts, or is 0.
    """
    whole = torch.ones_like(verdict, dtype=torch.bool) if valid is None else valid
    whole = whole.view(-1, group_size).all(dim=1).repeat_interleave(group_size)
    return torch.where(whole, verdict, 0)


def group_std(rewards: Tensor, group_size: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Population std of each group's rewards, exactly 0 for a tied group: a group that is 0 teaches nothing.

    Args:
        rewards: [B].
        group_size: G for adjacent groups, or [B] integer group ids.
        valid: [B] bool.

    Returns:
        [P], one number per group.
    """
    rewards = full_precision(rewards)
    groups, mask = group_mask(group_size, rewards, valid)
    split = groups.split(rewards)
    return torch.where(tied(split, mask), 0, masked_std(split, mask, 1, correction=0))[:, 0]


def _mean_over_opponents(beats: Tensor, mask: Tensor) -> Tensor:
    """[P, G, G] outcomes, [P, G] mask -> [P, G] mean over opponents that count, 1/2 where there is none."""
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    others = mask[:, None, :] & mask[:, :, None] & ~itself
    rate = masked_mean(beats, others, 2)[..., 0]
    return torch.where(others.any(dim=2), rate, 0.5)


def _column_weights(weights: Tensor, rewards: Tensor) -> Tensor:
    if rewards.ndim != 2 or weights.shape != rewards.shape[1:]:
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} for rewards of shape {tuple(rewards.shape)}: "
            "pass rewards [B, K] and one weight per column, [K]."
        )
    return weights.to(rewards)
