"""Rollouts that share steps: index arithmetic, values and advantages by hand, then laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlt2i.functional.advantages import group_relative_advantage
from rlt2i.functional.branching import (
    Paths,
    distinct_edges,
    edge_advantage,
    edge_values,
    separate_paths,
    tree_paths,
    trunk_paths,
)
from tests.helpers.published_advantages import tree_depth_advantage, tree_node_rewards

EIGHT = tree_paths(4, splits=(0, 1, 2), width=2, last=3)
REWARDS = torch.tensor([1.0, 3.0, 5.0, 7.0, 0.0, 2.0, 4.0, 6.0])


def close(found: Tensor, expected: list) -> None:
    torch.testing.assert_close(found, torch.tensor(expected).to(found.dtype), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- paths


def test_a_tree_by_hand():
    # Four leaves: all start together, split at step 0 into 01 and 23, and at step 2 into single leaves.
    paths = tree_paths(5, splits=(0, 2), width=2, last=4)
    assert paths.states.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 2, 2, 2, 2], [0, 2, 2, 3, 3]]
    assert paths.edges.tolist() == [[0, 0, 0, 0, -1], [0, 0, 1, 1, -1], [2, 2, 2, 2, -1], [2, 2, 3, 3, -1]]


def test_a_wider_tree_by_hand():
    # One split, not at the first step: until then all nine take the same noisy step.
    paths = tree_paths(3, splits=(1,), width=3, last=2)
    assert paths.edges.tolist() == [[0, 0, -1], [0, 1, -1], [0, 2, -1]]
    assert paths.states.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]


def test_branches_off_a_trunk_by_hand():
    # Rollouts 0 and 1 leave at step 1, rollouts 2 and 3 at step 2; until then they stand on the trunk.
    paths = trunk_paths(4, first=1, last=3, branches=2)
    assert paths.edges.tolist() == [[-1, 0, -1, -1], [-1, 1, -1, -1], [-1, -1, 2, -1], [-1, -1, 3, -1]]
    assert paths.states.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 2, 3]]


def test_separate_rollouts_share_nothing():
    paths = separate_paths(2, 3, (1,))
    assert paths == Paths(paths.states, paths.edges)
    assert paths.states.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert paths.edges.tolist() == [[-1, 0, -1], [-1, 1, -1]]


def test_groups_of_a_batch_count_on():
    paths = trunk_paths(2, first=0, last=1, branches=2).of_groups(2)
    assert paths.states.tolist() == [[0, 0], [0, 1], [2, 2], [2, 3]]
    assert paths.edges.tolist() == [[0, -1], [1, -1], [2, -1], [3, -1]]


# ------------------------------------------------------------------------------------------------ values, advantages


def test_values_and_advantages_of_eight_leaves_by_hand():
    # Values: 4 3 at the first step, 2 6 1 5 at the second, the rewards at the third; each step has mean 3.5.
    # Variances: 1/4, (2.25 + 6.25 + 6.25 + 2.25) / 4 = 17/4, (6.25 + .25 + 2.25 + 12.25) 2 / 8 = 21/4.
    values = edge_values(REWARDS, EIGHT.edges, 8)
    close(values[:, 0], [4, 4, 4, 4, 3, 3, 3, 3])
    close(values[:, 1], [2, 2, 6, 6, 1, 1, 5, 5])
    close(values[:, 2], REWARDS.tolist())
    assert (values[:, 3] == 0).all()
    advantage = edge_advantage(REWARDS, EIGHT.edges, 8, eps=0.0)
    close(advantage[:, 0], [1, 1, 1, 1, -1, -1, -1, -1])
    close(advantage[:, 1], [-0.72761, -0.72761, 1.21268, 1.21268, -1.21268, -1.21268, 0.72761, 0.72761])
    close(advantage[:, 2], [-1.09109, -0.21822, 0.65465, 1.52753, -1.52753, -0.65465, 0.21822, 1.09109])
    assert (advantage[:, 3] == 0).all()


def test_one_rollout_speaks_for_each_step():
    distinct = distinct_edges(EIGHT.edges, 8)
    assert distinct.nonzero().tolist() == [
        [0, 0], [0, 1], [0, 2], [1, 2], [2, 1], [2, 2], [3, 2], [4, 0], [4, 1], [4, 2], [5, 2], [6, 1], [6, 2], [7, 2]
    ]  # fmt: skip


def test_invalid_leaves_leave_their_ancestors():
    # Without leaves 0, 4 and 5: 5 = (3 + 5 + 7) / 3 and 5 at the first step; 3 6 - 5 at the second.
    valid = torch.tensor([False, True, True, True, False, False, True, True])
    rewards = torch.where(valid, REWARDS, torch.nan)
    values = edge_values(rewards, EIGHT.edges, 8, valid=valid)
    close(values[:, 0], [5.0] * 8)
    close(values[:, 1], [3, 3, 6, 6, 0, 0, 5, 5])
    advantage = edge_advantage(rewards, EIGHT.edges, 8, eps=0.0, valid=valid)
    assert (advantage[:, 0] == 0).all()
    # Mean 14/3, deviations -5/3 4/3 1/3, variance 42/27.
    close(advantage[:, 1], [0, -1.33631, 1.06904, 1.06904, 0, 0, 0.26726, 0.26726])
    distinct = distinct_edges(EIGHT.edges, 8, valid=valid)
    assert distinct[:, 0].nonzero()[:, 0].tolist() == [1, 6]
    assert distinct[:, 1].nonzero()[:, 0].tolist() == [1, 2, 6]
    assert not distinct[~valid].any()


def test_it_is_the_authors_advantage_up_to_their_std():
    # Nodes of the same tree, root first; unbiased std instead of population: sqrt((n - 1) / n).
    parents = torch.tensor([-1, 0, 0, 1, 1, 2, 2])
    depth = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    leaves = torch.tensor([0.2, 0.7, 0.4, 0.9])
    nodes = tree_node_rewards(torch.cat([torch.zeros(3), leaves]), parents)
    authors = tree_depth_advantage(nodes, depth, torch.zeros_like(depth))
    ours = edge_advantage(leaves, tree_paths(3, splits=(0, 1), width=2, last=2).edges, 4, eps=1e-8)
    torch.testing.assert_close(ours[[0, 2], 0] / 2**0.5, authors[1:3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[:, 1] * (3 / 4) ** 0.5, authors[3:], rtol=1e-5, atol=1e-6)


def test_with_one_branching_step_it_is_group_relative_per_prompt_and_step():
    # Two prompts, three steps with four branches: TempFlow-GRPO compares the four.
    edges = trunk_paths(5, first=1, last=4, branches=4).edges.repeat(2, 1)
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0))
    found = edge_advantage(rewards, edges, 12)
    torch.testing.assert_close(found.sum(dim=1), group_relative_advantage(rewards, 4), rtol=1e-4, atol=1e-5)
    assert ((found != 0) == (edges >= 0)).all()
    assert distinct_edges(edges, 12).sum() == 24


def test_alone_in_its_depth_an_edge_gets_nothing():
    edges = tree_paths(3, splits=(1,), width=2, last=2).edges
    advantage = edge_advantage(torch.tensor([0.0, 1.0]), edges, 2)
    assert (advantage[:, 0] == 0).all()
    assert (advantage[:, 1] != 0).all()


def test_rounding_is_no_preference():
    # Both first steps are worth .1 + .2 + .6 in another order; their values may differ in the last bit.
    edges = tree_paths(2, splits=(0, 1), width=3, last=2).edges
    rewards = torch.tensor([0.1, 0.2, 0.6, 0.6, 0.2, 0.1, 0.2, 0.6, 0.1])
    assert (edge_advantage(rewards, edges, 9)[:, 0] == 0).all()
    assert (edge_advantage(torch.full((9,), 0.7), edges, 9) == 0).all()


# -------------------------------------------------------------------------------------------------------------- laws

trees = st.tuples(st.integers(2, 3), st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))


@settings(max_examples=40, deadline=None)
@given(tree=trees, seed=st.integers(0, 1000), lost=st.floats(0, 1))
def test_laws_of_trees(tree: tuple[int, list[int]], seed: int, lost: float):
    width, splits = tree
    paths = tree_paths(6, splits=sorted(splits), width=width, last=5)
    size = len(paths.states)
    draw = torch.Generator().manual_seed(seed)
    edges = paths.edges.repeat(2, 1)
    rewards, valid = torch.rand(2 * size, generator=draw), torch.rand(2 * size, generator=draw) >= lost
    distinct = distinct_edges(edges, size, valid=valid)
    advantage = edge_advantage(rewards, edges, size, valid=valid)
    # Over the different steps of a depth the mean is 0, and each that has a valid leaf is counted exactly once.
    means = torch.where(distinct, advantage, 0).unflatten(0, (2, size)).sum(dim=1)
    torch.testing.assert_close(means, torch.zeros_like(means), atol=2e-4, rtol=0)
    for group in range(2):
        rows = slice(group * size, (group + 1) * size)
        for step in range(5):
            taken = edges[rows, step][valid[rows]].unique()
            assert edges[rows, step][distinct[rows, step]].sort().values.tolist() == taken.tolist()
    assert not distinct[~valid].any()
    assert (advantage[~valid] == 0).all()
    # Numbers are only names, and the order of rollouts does not matter.
    order = torch.cat([torch.randperm(size, generator=draw), size + torch.randperm(size, generator=draw)])
    renamed = torch.where(edges >= 0, 7 * edges + 3, -1)
    again = edge_advantage(rewards[order], renamed[order], size, valid=valid[order])
    torch.testing.assert_close(again, advantage[order], atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(tree=trees)
def test_states_branch_where_edges_do(tree: tuple[int, list[int]]):
    width, splits = tree
    states, edges = tree_paths(6, splits=sorted(splits), width=width, last=5)
    for step in range(5):
        # Who takes the same step stands at the same state before and after it, and the other way round after it.
        for one in range(len(states)):
            together = edges[:, step] == edges[one, step]
            assert (states[together, step] == states[one, step]).all()
            assert torch.equal(together, states[:, step + 1] == states[one, step + 1])
    assert len(states[:, -1].unique()) == width ** len(splits)


@pytest.mark.parametrize("valid", [torch.ones(3, dtype=torch.bool), torch.ones(8)])
def test_bad_validity_is_refused(valid: Tensor):
    with pytest.raises(ValueError, match="does not say which of 8 rewards"):
        edge_advantage(REWARDS, EIGHT.edges, 8, valid=valid)
