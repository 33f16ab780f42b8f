"""Formulas of published code that no part uses, against which ours and the golden cases are compared: advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlt2i.evaluation.best_worst import _first, _is_best, _is_worst
from rlt2i.functional.advantages import _column_weights, group_relative_advantage, group_std
from rlt2i.functional.groups import group_layout, group_mask, masked_mean, masked_std, tied
from rlt2i.functional.numerics import full_precision

History = Mapping[str, tuple[float, ...]]


class TrackedAdvantage(NamedTuple):
    """Attributes: advantage [B]; history, to be passed to the next call."""

    advantage: Tensor
    history: dict[str, tuple[float, ...]]


def tracked_advantage(
    rewards: Tensor,
    prompts: Sequence[str],
    history: History,
    *,
    buffer_size: int = 16,
    min_count: int = 16,
    eps: float = 1e-6,
) -> TrackedAdvantage:
    """DDPO's advantage from each prompt's recent rewards (arXiv 2305.13301), for batches without groups.

        A_i = (r_i - mean) / (std + eps)

    over the last `buffer_size` rewards of the prompt, including this batch; prompts seen less than
    `min_count` times use the mean and std of this batch. Population std.

    Args:
        rewards: [B].
        prompts: B texts.
        history: past rewards per prompt, oldest first; {} at the start.
        buffer_size: how many rewards of a prompt to remember.
        min_count: how many rewards make a prompt's own statistics.
        eps: added to the std.

    Returns:
        TrackedAdvantage.
    """
    if len(prompts) != len(rewards):
        raise ValueError(f"{len(prompts)} prompts for {len(rewards)} rewards: pass one prompt per reward.")
    if buffer_size < 1:
        raise ValueError(f"buffer_size={buffer_size}: a prompt needs room for at least one reward.")
    rewards = full_precision(rewards)
    updated = dict(history)
    for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
        updated[prompt] = (*updated.get(prompt, ()), reward)[-buffer_size:]
    known = {prompt: rewards.new_tensor(updated[prompt]) for prompt in set(prompts)}
    pools = [known[prompt] if len(known[prompt]) >= min_count else rewards for prompt in prompts]
    mean = torch.stack([pool.mean() for pool in pools])
    std = torch.stack([pool.std(correction=0) for pool in pools])
    return TrackedAdvantage((rewards - mean) / (std + eps), updated)


def sum_of_normalised(
    rewards: Tensor,
    weights: Tensor,
    group_size: int | Tensor,
    *,
    eps: float = 1e-8,
    correction: int = 1,
    trim: float = 0.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Normalise each reward in its group first, then add (MixGRPO, arXiv 2507.21802).

        A_i = sum_k w_k (r_ik - mean_group) / (std_group + eps)

    Args:
        rewards: [B, K] one column per reward.
        weights: [K].
        group_size: G for adjacent groups, or [B] integer group ids.
        eps: added to each std.
        correction: 1 for the unbiased std (MixGRPO), 0 for the population std.
        trim: this share of a group's *lowest* rewards is left out of its mean and std (but still gets an
            advantage).
        valid: [B] bool.

    Returns:
        [B].
    """
    if not 0 <= trim < 1:
        raise ValueError(f"trim={trim}: the share of left-out rewards lies in [0, 1); 0 keeps all of them.")
    rewards = full_precision(rewards)
    groups, mask = group_mask(group_size, rewards, valid)
    split = groups.split(rewards)
    kept = mask & (_rank_in_group(split, mask) >= (mask.sum(dim=1, keepdim=True).double() * trim).floor())
    centred = split - masked_mean(split, kept, 1)
    normalised = centred / (masked_std(split, kept, 1, correction=correction) + eps)
    advantage = torch.where(mask & ~tied(split, mask), normalised, 0)
    return (groups.merge(advantage) * _column_weights(weights, rewards)).sum(dim=1)


def zero_std_ratio(rewards: Tensor, group_size: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Share of groups whose rewards are all equal (Flow-GRPO's metric of the same name).

    Args:
        rewards: [B].
        group_size: G for adjacent groups, or [B] integer group ids.
        valid: [B] bool.

    Returns:
        [] in [0, 1].
    """
    spread = group_std(rewards, group_size, valid=valid)
    return (spread == 0).to(spread.dtype).mean()


def _rank_in_group(split: Tensor, mask: Tensor) -> Tensor:
    """[P, G, ...] place of each reward in its group in ascending order; what does not count comes last."""
    return torch.where(mask, split, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)


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
    return groups.merge(signs)


def _one_hot(place: Tensor, like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device) == place[:, None]


def tree_node_rewards(leaf_rewards: Tensor, parents: Tensor, log_probs: Tensor | None = None) -> Tensor:
    """Reward of every node of a branching rollout, from the leaves upwards (BranchGRPO, arXiv 2509.06040).

    Without log-probs a node gets the mean over its leaf descendants; with them the mean over its children,
    weighted by the softmax of the log-probs of the edges that lead to them.

    Args:
        leaf_rewards: [N]; only the entries of leaves are read.
        parents: [N] long, the parent's index, smaller than the node's own; -1 for a root. Several trees may
            share one list.
        log_probs: [N] log-prob of the edge into each node (not read for roots), or None for the plain mean.

    Returns:
        [N].
    """
    rewards = full_precision(leaf_rewards)
    parent_of = [int(parent) for parent in parents.tolist()]
    if any(parent >= node for node, parent in enumerate(parent_of)):
        raise ValueError("a parent must come before its children: order the nodes from the root to the leaves.")
    children: list[list[int]] = [[] for _ in parent_of]
    for node, parent in enumerate(parent_of):
        if parent >= 0:
            children[parent].append(node)
    values: list[Tensor] = list(rewards.unbind())
    leaves = rewards.new_ones(len(parent_of))
    for node in reversed(range(len(parent_of))):
        below = children[node]
        if not below:
            continue
        child_values = torch.stack([values[child] for child in below])
        share = leaves[below] if log_probs is None else torch.softmax(log_probs[below].to(rewards), dim=0)
        values[node] = (share * child_values).sum() / share.sum()
        leaves[node] = leaves[below].sum()
    return torch.stack(values)


def tree_depth_advantage(
    node_rewards: Tensor, depth: Tensor, tree: Tensor, *, eps: float = 1e-8, min_std: float = 1e-6
) -> Tensor:
    """Compare nodes of one depth of one tree (BranchGRPO, arXiv 2509.06040): (R - mean) / (unbiased std + eps).

    Args:
        node_rewards: [N] from `tree_node_rewards`.
        depth: [N] long.
        tree: [N] long, which tree a node belongs to.
        eps: added to the std.
        min_std: a depth with a smaller std (or a single node) gets 0.

    Returns:
        [N].
    """
    rewards = full_precision(node_rewards)
    ids = tree.long() * (int(depth.max()) + 1) + depth.long()
    layout = group_layout(ids, len(rewards), rewards.device)
    split = layout.split(rewards)
    spread = masked_std(split, layout.present, 1, correction=1)
    advantage = group_relative_advantage(rewards, ids, eps=eps, correction=1)
    return torch.where(layout.merge((spread >= min_std).expand_as(split)), advantage, 0)


def awm_sum_first(log_ratio: Tensor, times: int) -> Tensor:
    """One log-ratio per sample from those at its times, their mean ("sum first"; AWM, arXiv 2509.25050).

    exp of it is the geometric mean of the ratios. The published default, "exp first", keeps one ratio per sample and
    time instead, and so does the part `AWM`. On policy both have the same gradient.

    Args:
        log_ratio: [T B, ...] differences l - l_old, times outermost: the first B are the samples at their first time.
        times: T.

    Returns:
        [B, ...].
    """
    if times < 1 or len(log_ratio) % times:
        raise ValueError(
            f"times={times} does not divide {len(log_ratio)} log-ratios. Pass every sample at equally many times, the "
            "times outermost."
        )
    return full_precision(log_ratio).unflatten(0, (times, -1)).mean(dim=0)
