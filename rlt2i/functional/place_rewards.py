"""Rewards per place, from the reward of the image and a map of what is wrong with it.

Normalise them place by place over the group (`group_relative_advantage` takes [B, h, w]): the advantage then has a sign
of its own at every place.
"""

import torch
from torch import Tensor

from .advantages import group_relative_advantage, group_std
from .numerics import full_precision


def box_flow_rewards(
    rewards: Tensor, judged: Tensor, group_size: int, *, strength: float, valid: Tensor | None = None
) -> Tensor:
    """BoxFlow-GRPO's reward per place, R_p = R + c sigma_R J_p (SDG, arXiv 2606.06113: J = -W, c = .5 or .05).

    The step is in units of the group's own spread, so that a region moves its places by as much whatever the scale of
    the reward; where the group agrees about R, regions say nothing.

    Args:
        rewards: [B] of the images.
        judged: [B, h, w] in [-1, 1], below 0 where a region hurt (the paper's W with a minus), above 0 where one
            helped.
        group_size: G, rollouts of one prompt that are adjacent.
        strength: c.
        valid: [B] bool, what counts for sigma_R.

    Returns:
        [B, h, w].
    """
    rewards = full_precision(rewards)
    spread = group_std(rewards, group_size, valid=valid).repeat_interleave(group_size)
    return rewards[:, None, None] + strength * spread[:, None, None] * judged.to(rewards)


def dense_flow_rewards(rewards: Tensor, damage: Tensor) -> Tensor:
    """DenseFlow-GRPO's reward per place, R_p = R (1 - D_p) (ImageDoctor, arXiv 2510.01010).

    A negative reward becomes more so, R - |R| D: the paper's rewards are positive, and damage must never raise one.

    Args:
        rewards: [B] of the images.
        damage: [B, h, w] in [0, 1].

    Returns:
        [B, h, w].
    """
    rewards = full_precision(rewards)[:, None, None]
    return rewards - rewards.abs() * damage.to(rewards)


def place_relative_advantage(
    rewards: Tensor, group_size: int, *, size: Tensor, min_std: float, valid: Tensor | None = None
) -> Tensor:
    """Every place compared with the same place of the group, A_ip = (R_ip - mean_i R_ip) / max(std_i R_ip, min_std).

    Args:
        rewards: [B, h, w].
        group_size: G, rollouts of one prompt that are adjacent.
        size: [B], the rewards of the images; it decides what is rounding where a place's rewards nearly cancel.
        min_std: floor of the standard deviation (.1 in both papers): a place that hardly differs is not blown up.
        valid: [B] bool; the others leave the statistics and get 0.

    Returns:
        [B, h, w], mean 0 over every group at every place.
    """
    scale = torch.maximum(rewards.abs(), size.abs().to(rewards)[:, None, None])
    scale = torch.where(torch.isfinite(scale), scale, 0)
    return group_relative_advantage(rewards, group_size, eps=0.0, min_std=min_std, valid=valid, size=scale)
