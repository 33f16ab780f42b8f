"""Diffusion-DPO for flows: preferences between two images as a logistic loss on flow-matching errors."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .groups import group_mask, tied
from .matching import credit_map
from .numerics import Scalar, check_same_shape, full_precision


def dpo_logits(
    error_winner: Tensor,
    error_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    *,
    beta: float = 100.0,
    weight_winner: Scalar = 1.0,
    weight_loser: Scalar = 1.0,
) -> Tensor:
    """Log-odds that the winner is preferred (Diffusion-DPO, arXiv 2311.12908, in Flow-GRPO's form for flows).

        z = -beta/2 mean_p [ w+_p (e_w - e_w^ref)_p - w-_p (e_l - e_l^ref)_p ]

    Spatial weights belong inside the logit: outside they would only rescale a pair's loss. Errors are *means*
    over channels and space, hence beta = 100; Diffusion-DPO's 2000 to 5000 has a factor T absorbed.

    Args:
        error_winner: [B, H, W] flow-matching error of the policy on the winner; gradients flow.
        error_loser: [B, H, W] on the loser, same noise and sigma.
        reference_winner: [B, H, W] of the frozen reference on the winner.
        reference_loser: [B, H, W] of the frozen reference on the loser.
        beta: strength of the implicit KL.
        weight_winner: mean-one weights of the winner; float, [B], or broadcastable to [B, H, W].
        weight_loser: mean-one weights of the loser.

    Returns:
        [B].
    """
    if beta <= 0:
        raise ValueError(f"beta={beta}: the preference would not depend on the policy. Use a positive beta.")
    check_same_shape(
        error_winner=error_winner,
        error_loser=error_loser,
        reference_winner=reference_winner,
        reference_loser=reference_loser,
    )
    winner = full_precision(error_winner) - full_precision(reference_winner.detach())
    loser = full_precision(error_loser) - full_precision(reference_loser.detach())
    difference = credit_map(weight_winner, winner, name="weight_winner") * winner
    difference = difference - credit_map(weight_loser, loser, name="weight_loser") * loser
    return -0.5 * beta * difference.mean(dim=(1, 2))


def dpo_loss(logits: Tensor) -> Tensor:
    """Logistic loss of preferences, L = -log sigmoid(z) (DPO, arXiv 2305.18290).

    Args:
        logits: [B] from `dpo_logits`.

    Returns:
        [B]; log 2 where policy and reference agree.
    """
    return -F.logsigmoid(full_precision(logits))


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


def best_worst_signs(rewards: Tensor, group_size: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Flow-GRPO's "dpo" advantage: +1 for the first best, -1 for the first worst of each group, else 0.

    Where all rewards are equal, the second rollout gets +1 and the first one -1, as in the published code: leave
    groups with `group_std` 0 out if they should not train.

    Args:
        rewards: [B].
        group_size: G for adjacent groups, or [B] integer group ids.
        valid: [B] bool.

    Returns:
        [B] of -1, 0, 1; a group with fewer than two valid rollouts gets zeros.
    """
    rewards = full_precision(rewards)
    groups, mask = group_mask(group_size, rewards, valid)
    split = groups.split(rewards)
    order = mask.cumsum(dim=1)
    flat = tied(split, mask)
    best = torch.where(flat, mask & (order == 2), _one_hot(_first(_is_best(split, mask)), split))
    worst = torch.where(flat, mask & (order == 1), _one_hot(_first(_is_worst(split, mask)), split))
    enough = mask.sum(dim=1, keepdim=True) >= 2
    signs = torch.where(enough, best.to(split.dtype) - worst.to(split.dtype), 0)
    return groups.merge(signs, len(rewards))


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


def _one_hot(place: Tensor, like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device) == place[:, None]
