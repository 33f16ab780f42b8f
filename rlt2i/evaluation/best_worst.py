"""The best and the worst image of every group: the pairs that offline DPO reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlt2i.functional.groups import group_mask, tied
from rlt2i.functional.numerics import full_precision


class PreferencePairs(NamedTuple):
    """One pair per group.

    Attributes:
        winner: [P] long, index of the best rollout of each group into the batch.
        loser: [P] long, index of the worst one.
        distinct: [P] bool, False where the best reward is not higher than the worst: such a pair teaches
            nothing.
    """

    winner: Tensor
    loser: Tensor
    distinct: Tensor


def best_worst_pairs(rewards: Tensor, group_size: int | Tensor, *, valid: Tensor | None = None) -> PreferencePairs:
    """Best and worst rollout of each group for online DPO: the first best and the last worst (verl-omni).

    Args:
        rewards: [B].
        group_size: G for adjacent groups, or [B] integer group ids.
        valid: [B] bool; invalid rollouts are never chosen as long as the group has a valid one.

    Returns:
        PreferencePairs; groups in their order in the batch, or in ascending order of id.
    """
    rewards = full_precision(rewards)
    groups, mask = group_mask(group_size, rewards, valid)
    split = groups.split(rewards)
    best, worst = _first(_is_best(split, mask)), _last(_is_worst(split, mask))
    distinct = mask.any(dim=1) & ~tied(split, mask)[:, 0]
    rows = torch.arange(len(best), device=best.device)
    return PreferencePairs(groups.rows[rows, best], groups.rows[rows, worst], distinct)


def _is_best(split: Tensor, mask: Tensor) -> Tensor:
    return mask & (split == torch.where(mask, split, -torch.inf).amax(dim=1, keepdim=True))


def _is_worst(split: Tensor, mask: Tensor) -> Tensor:
    return mask & (split == torch.where(mask, split, torch.inf).amin(dim=1, keepdim=True))


def _first(flags: Tensor) -> Tensor:
    """[P, G] bool -> [P] index of the first True (argmax alone does not promise the first)."""
    places = torch.arange(flags.shape[1], 0, -1, device=flags.device)
    return (flags * places).argmax(dim=1)


def _last(flags: Tensor) -> Tensor:
    places = torch.arange(1, flags.shape[1] + 1, device=flags.device)
    return (flags * places).argmax(dim=1)
