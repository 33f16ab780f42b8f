"""Credit per step: contributions, turning points, trees."""

import pytest
import torch
from torch import Tensor

from rlt2i.functional.step_credit import (
    balance_turning_points,
    clean_similarity,
    coca_advantage,
    coca_contribution,
    turning_point_reward,
    turning_points,
)
from tests.helpers.published_advantages import tree_depth_advantage, tree_node_rewards


def close(actual: Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=1e-6, rtol=0)


def test_contributions_by_hand():
    # Similarities .2, .5, 1: of the total gain .8 the first step made .3.
    close(coca_contribution(torch.tensor([[0.2, 0.5, 1.0]])), [[0.375, 0.625]])
    close(coca_contribution(torch.tensor([[1.0, 1.0, 1.0]])), [[0.5, 0.5]])


def test_similarity_ends_at_one():
    final = torch.tensor([[3.0, 4.0]]).view(1, 2, 1, 1)
    predictions = torch.tensor([[[4.0, 3.0], [-3.0, -4.0]]]).view(1, 2, 2, 1, 1)
    close(clean_similarity(predictions, final), [[0.96, -1.0, 1.0]])


def test_coca_advantage_by_hand():
    # alpha 0: what is still to be contributed is 1 and .625; two rollouts of opposite sign normalise to -+1.
    contribution = torch.tensor([[0.375, 0.625], [0.375, 0.625]])
    close(coca_advantage(torch.tensor([2.0, -2.0]), contribution, 2, alpha=0.0, eps=0.0), [[1, 1], [-1, -1]])


def test_coca_counts_what_is_still_to_come():
    # Still to be contributed: 1 and .8 by the first rollout, 1 and .5 by the second, so 2, 1.6 against 1, .5. What was
    # contributed so far, .2 and .5 of it at the first step, would turn the order around: .4 against .5.
    contribution = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    close(coca_advantage(torch.tensor([2.0, 1.0]), contribution, 2, alpha=0.0, eps=0.0), [[1, 1], [-1, -1]])


def test_a_step_without_gain_is_no_turn_and_the_last_step_has_nothing_to_agree_with():
    final = torch.tensor([2.0])
    # Nothing was lost at the first step, so the second does not turn anything around.
    assert turning_points(torch.tensor([0.0]), torch.tensor([[0.0, 1.0]]), final).tolist() == [[False, False]]
    # The second turns, but the outcome is reached: R_final - R_t is 0 and not of its sign.
    steps = torch.tensor([[-1.0, 2.0]])
    assert turning_points(torch.tensor([0.0]), steps, final).tolist() == [[False, False]]
    assert turning_points(torch.tensor([0.0]), steps, final, consistent_later=False).tolist() == [[False, True]]


def test_turning_points_by_hand():
    # ODE 0, then 1, -1, 2, final 3: gains +1, -2, +3 against a rising outcome: the third step turns, the first
    # starts.
    ode, steps, final = torch.tensor([0.0]), torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([3.0])
    assert turning_points(ode, steps, final).tolist() == [[True, False, True]]
    assert turning_points(ode, steps, final, first=False).tolist() == [[False, False, True]]
    # The third step reverses too if any reversal counts, and so does the second.
    every = turning_points(ode, steps, final, any_reversal=True, consistent_later=False)
    assert every.tolist() == [[True, True, True]]

    points = turning_points(ode, steps, final)
    replaced = turning_point_reward(ode, steps, final, points)
    close(replaced.reward, [[3.0, -2.0, 4.0]])  # remaining R_final - R_{t-1}: 3 and 4
    close(turning_point_reward(ode, steps, final, points, replace=False).reward, [[4.0, -2.0, 7.0]])
    close(turning_point_reward(ode, steps, final, points, eta=0.5, bonus="global").reward, [[1.5, -2.0, 1.5]])
    # Propagation: step 2 is marked by the rising first point, step 3 by both: remaining 3, 2, 4 times 1, 1, 2.
    close(turning_point_reward(ode, steps, final, points, propagate=True).reward, [[3.0, 2.0, 8.0]])


def test_balancing_keeps_the_strongest_of_each_side():
    points = torch.tensor([[True, True, True], [True, False, True]])
    strength = torch.tensor([[1.0, 3.0, -1.0], [2.0, -9.0, -5.0]])
    # Three rising, two falling: the weakest rising one goes.
    assert balance_turning_points(points, strength).tolist() == [[False, True, True], [True, False, True]]
    assert balance_turning_points(points, strength.abs()).tolist() == points.tolist()


def test_tree_by_hand():
    #        0
    #      1   2        leaves 3, 4, 5 with rewards 1, 3, 8
    #     3 4   5
    parents = torch.tensor([-1, 0, 0, 1, 1, 2])
    leaves = torch.tensor([0.0, 0.0, 0.0, 1.0, 3.0, 8.0])
    close(tree_node_rewards(leaves, parents), [4.0, 2.0, 8.0, 1.0, 3.0, 8.0])
    # Edges into 3 and 4 with odds 1 to 3: node 1 gets .25 + 2.25; the edges into 1 and 2 are even.
    log_probs = torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0, 0.0]).where(torch.arange(6) != 4, torch.tensor(3.0).log())
    close(tree_node_rewards(leaves, parents, log_probs), [5.25, 2.5, 8.0, 1.0, 3.0, 8.0])

    rewards, depth = tree_node_rewards(leaves, parents), torch.tensor([0, 1, 1, 2, 2, 2])
    advantage = tree_depth_advantage(rewards, depth, torch.zeros(6, dtype=torch.long))
    close(advantage[:3], [0.0, -(0.5**0.5), 0.5**0.5])  # the root alone is 0; unbiased std of (2, 8) is 3 sqrt 2
    # A second tree next to it changes nothing: depths are compared within one tree.
    both = tree_depth_advantage(
        torch.cat([rewards, 10 * rewards]), torch.cat([depth, depth]), torch.arange(2).repeat_interleave(6)
    )
    torch.testing.assert_close(both[:6], advantage)
    torch.testing.assert_close(both[6:], advantage)


def test_a_depth_without_spread_gets_zero():
    rewards = torch.tensor([0.5, 0.5 + 1e-8, 0.5], dtype=torch.float64)
    assert (tree_depth_advantage(rewards, torch.zeros(3), torch.zeros(3)) == 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tree_node_rewards(torch.ones(2), torch.tensor([1, -1])), "parent must come before"),
        (lambda: turning_points(torch.ones(2), torch.ones(3, 4), torch.ones(2)), "do not belong together"),
        (lambda: coca_advantage(torch.ones(2), torch.ones(2, 3), 2, alpha=2.0), "alpha=2.0"),
        (
            lambda: turning_point_reward(
                torch.ones(1), torch.ones(1, 1), torch.ones(1), torch.ones(1, 1) > 0, bonus="gain"
            ),
            "bonus='gain'",
        ),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
