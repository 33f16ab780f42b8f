"""Rollouts that share steps: who stands where, and what the steps they share are worth.

A group's G rollouts are the leaves of a tree. Each of them keeps its whole path, so a batch stays rectangular and a
shared prefix is a set of equal rows; `Paths` says which rows those are, as the first rollout that is equal.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import group_mask, masked_mean, masked_std, tied
from .numerics import full_precision


class Paths(NamedTuple):
    """Which rollouts of a group of G share states and noisy steps.

    Attributes:
        states: [G, T] long, the first rollout that stands at the same state before step t.
        edges: [G, T] long, the first rollout that takes the same noisy step t; -1 where a rollout draws no noise.
    """

    states: Tensor
    edges: Tensor

    def of_groups(self, num_groups: int) -> "Paths":
        """The same for a batch of groups, [num_groups * G, T], with numbers that count through the batch."""
        first = torch.arange(num_groups).repeat_interleave(len(self.states))[:, None] * len(self.states)
        edges = self.edges.repeat(num_groups, 1)
        return Paths(self.states.repeat(num_groups, 1) + first, torch.where(edges >= 0, edges + first, -1))


def separate_paths(group_size: int, num_steps: int, noisy_steps: Collection[int]) -> Paths:
    """Rollouts that share nothing: each draws its own noise at the noisy steps."""
    own = torch.arange(group_size)[:, None].expand(-1, num_steps)
    noisy = torch.tensor([step in noisy_steps for step in range(num_steps)])
    return Paths(own, torch.where(noisy, own, -1))


def tree_paths(num_steps: int, *, splits: Sequence[int], width: int, last: int) -> Paths:
    """A tree whose every node branches into `width` children at each split (BranchGRPO, arXiv 2509.06040).

    Leaf i is at the end of the branches that the digits of i to the base `width` name, the first split first. All steps
    before `last` are noisy: between splits a node draws noise of its own, which its descendants share.

    Args:
        num_steps: T.
        splits: steps at which nodes branch, increasing, all below `last`.
        width: children of a node.
        last: end of the noisy steps, exclusive.

    Returns:
        Paths of G = width ** len(splits) rollouts.
    """
    leaves = torch.arange(width ** len(splits))[:, None]
    splits_before = torch.tensor([sum(split < step for split in splits) for step in range(num_steps + 1)])
    below = width ** (len(splits) - splits_before)  # leaves of a node at each of the T + 1 states
    first = leaves - leaves % below
    noisy = torch.arange(num_steps) < last
    return Paths(first[:, :-1], torch.where(noisy, first[:, 1:], -1))


def trunk_paths(num_steps: int, *, first: int, last: int, branches: int) -> Paths:
    """Branches off one deterministic trunk (TempFlow-GRPO, arXiv 2508.04324).

    At each step of [first, last) `branches` rollouts leave the trunk by one noisy step; before and after it they are
    deterministic.

    Args:
        num_steps: T.
        first, last: of the steps at which rollouts leave, last exclusive.
        branches: rollouts that leave at one step.

    Returns:
        Paths of G = (last - first) branches rollouts; those that leave first come first.
    """
    rollouts, steps = torch.arange((last - first) * branches)[:, None], torch.arange(num_steps)
    leaves_at = first + rollouts // branches
    on_trunk = (steps - first).clamp_min(0) * branches  # the first rollout that has not left before step t
    return Paths(
        torch.where(steps <= leaves_at, on_trunk, rollouts),
        torch.where(steps == leaves_at, rollouts, -1),
    )


def edge_values(rewards: Tensor, edges: Tensor, group_size: int, *, valid: Tensor | None = None) -> Tensor:
    """The mean reward of all leaves below each edge (BranchGRPO, arXiv 2509.06040).

        V(e) = mean of r_i over the valid rollouts i whose path leads through e

    Args:
        rewards: [B] of the leaves.
        edges: [B, T] long; equal numbers in a group at one step are one edge, -1 is none.
        group_size: G; the rollouts of a group are adjacent.
        valid: [B] bool; invalid leaves leave the means of their ancestors.

    Returns:
        [B, T] the value of each rollout's edge; 0 where there is none, or none of its leaves is valid.
    """
    groups, _ = group_mask(group_size, rewards, valid)
    below = _leaves_below(edges, group_size, valid)
    leaves = groups.split(full_precision(rewards))[:, None, :, None]
    return groups.merge(masked_mean(leaves.expand(below.shape), below, 2)[:, :, 0])


def distinct_edges(edges: Tensor, group_size: int, *, valid: Tensor | None = None) -> Tensor:
    """One valid rollout of each edge, the first, so that an edge that many take is counted once.

    Args:
        edges, group_size, valid: see `edge_values`.

    Returns:
        [B, T] bool; no rollout of an edge without a valid leaf.
    """
    groups, _ = group_mask(group_size, edges[:, 0], valid)
    below = _leaves_below(edges, group_size, valid)
    rollouts = torch.arange(group_size, device=edges.device)[:, None]
    first = below.any(dim=2) & (below.to(torch.uint8).argmax(dim=2) == rollouts)
    return groups.merge(first)


def edge_advantage(
    rewards: Tensor,
    edges: Tensor,
    group_size: int,
    *,
    eps: float = 1e-4,
    valid: Tensor | None = None,
) -> Tensor:
    """Compare the edges of a group that are taken at the same step (BranchGRPO, arXiv 2509.06040).

        A(e) = (V(e) - mean) / (std + eps),   mean and population std over the distinct edges of e's group and step

    The authors divide by the unbiased std + 1e-8. With one branching step per rollout the
    edges of a step are its branches, and this is TempFlow-GRPO's advantage per prompt and step (arXiv 2508.04324).

    Args:
        rewards, edges, group_size, valid: see `edge_values`.
        eps: added to the std. Edges whose values differ by the rounding of the rewards only get 0.

    Returns:
        [B, T] the advantage of each rollout's edge; 0 for invalid rollouts and where there is no edge. It has mean 0
        over the distinct edges of a group and step.
    """
    groups, mask = group_mask(group_size, rewards, valid)
    split = groups.split(full_precision(rewards))
    lowest = torch.where(mask, split, torch.inf).amin(dim=1, keepdim=True)
    gains = groups.merge(torch.where(mask, split - lowest, 0))  # equal rewards: means that are exactly 0
    values = groups.split(edge_values(gains, edges, group_size, valid=valid))
    distinct = groups.split(distinct_edges(edges, group_size, valid=valid))
    spread = masked_std(values, distinct, 1, correction=0)
    advantage = (values - masked_mean(values, distinct, 1)) / (spread + eps)
    counted = mask[..., None] & (groups.split(edges) >= 0) & ~tied(values, distinct, split[..., None])
    return groups.merge(torch.where(counted, advantage, 0))


def _leaves_below(edges: Tensor, group_size: int, valid: Tensor | None) -> Tensor:
    """[P, G, G, T] bool: whether the second rollout is valid and takes the same edge as the first."""
    groups, mask = group_mask(group_size, edges[:, 0], valid)
    split = groups.split(edges)
    return (split[:, :, None] == split[:, None]) & (split[:, :, None] >= 0) & mask[:, None, :, None]
