"""Advantages: by hand, then laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from rlt2i.evaluation.best_worst import best_worst_pairs
from rlt2i.functional.advantages import (
    best_of_group,
    gdpo,
    group_relative_advantage,
    group_std,
    reward_weights,
    step_gain,
    win_rate,
    win_rate_advantage,
)
from tests.helpers.published_advantages import best_worst_signs, sum_of_normalised, tracked_advantage, zero_std_ratio

rewards_of_groups = arrays("float64", st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(-3, 3))


def close(actual: Tensor, expected: list, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


def test_group_relative_by_hand():
    # Means 2 and 5, stds 1 and 0.
    close(group_relative_advantage(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2), [-1.0, 1.0, 0.0, 0.0], atol=1e-3)
    # Over the whole batch: mean 3.5, squared deviations 6.25, .25, 2.25, 2.25, so the variance is 2.75.
    advantage = group_relative_advantage(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2, std="global", eps=0.0)
    close(advantage, [-1 / 2.75**0.5, 1 / 2.75**0.5, 0.0, 0.0])
    # Unbiased: the std of (1, 3) is sqrt 2.
    close(group_relative_advantage(torch.tensor([1.0, 3.0]), 2, eps=0.0, correction=1), [-(0.5**0.5), 0.5**0.5])


def test_step_rewards_are_normalised_column_by_column():
    rewards = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
    close(group_relative_advantage(rewards, 2, eps=0.0), [[-1.0, 0.0], [1.0, 0.0]])


@settings(max_examples=40, deadline=None)
@given(rewards_of_groups, st.sampled_from(["group", "global"]))
def test_every_group_has_mean_zero_and_a_tied_one_is_exactly_zero(values, std):
    rewards = torch.from_numpy(values)
    advantage = group_relative_advantage(rewards.flatten(), values.shape[1], std=std).view_as(rewards)
    torch.testing.assert_close(advantage.mean(dim=1), torch.zeros(len(rewards), dtype=torch.float64), atol=1e-9, rtol=0)
    tied = (rewards == rewards[:, :1]).all(dim=1)
    assert (advantage[tied] == 0).all()


def test_rounding_noise_of_a_tied_group_stays_zero():
    # The float32 mean of three times .1 is not .1: without care the advantage would be about 1e-4.
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.9, 0.4])
    assert (group_relative_advantage(rewards, 3, eps=1e-8)[:3] == 0).all()


@settings(max_examples=40, deadline=None)
@given(rewards_of_groups, st.randoms(use_true_random=False))
def test_group_ids_make_the_order_irrelevant(values, random):
    rewards = torch.from_numpy(values).flatten()
    ids = torch.arange(values.shape[0]).repeat_interleave(values.shape[1])
    order = list(range(len(rewards)))
    random.shuffle(order)
    for function in (group_relative_advantage, best_of_group, win_rate):
        expected = function(rewards, values.shape[1])
        torch.testing.assert_close(function(rewards[order], ids[order]), expected[order])


def test_ragged_groups():
    rewards, ids = torch.tensor([1.0, 10.0, 3.0, 7.0, 2.0]), torch.tensor([4, 9, 4, 1, 4])
    # Group 4: mean 2, variance 2/3; the others have one member.
    close(group_relative_advantage(rewards, ids, eps=0.0), [-(1.5**0.5), 0.0, 1.5**0.5, 0.0, 0.0])


def test_failed_rewards_leave_the_statistics():
    rewards = torch.tensor([1.0, float("nan"), 3.0, 100.0, 4.0, 4.0])
    valid = torch.tensor([True, False, True, False, True, True])
    close(group_relative_advantage(rewards, 3, eps=0.0, valid=valid), [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    for std in ("group", "global"):
        nobody = group_relative_advantage(rewards, 3, std=std, valid=torch.zeros(6, dtype=torch.bool))
        assert (nobody == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    assert group_relative_advantage(torch.rand(4, dtype=dtype), 2).dtype == dtype
    assert group_relative_advantage(torch.tensor([1, 2, 3, 5]), 2).dtype == torch.float32


def test_step_gain_by_hand():
    # Gains (1, 0) and (3, 0): the first column is normalised to -1, 1 and the second is tied.
    values = torch.tensor([[0.0, 1.0, 1.0], [0.0, 3.0, 3.0]])
    close(step_gain(values, 2, eps=0.0), [[-1.0, 0.0], [1.0, 0.0]])


def test_sum_of_normalised_by_hand():
    rewards, weights = torch.tensor([[1.0, 30.0], [3.0, 10.0]]), torch.tensor([1.0, 0.5])
    # Both columns are +-1 (population std), so A = -+1 +- .5.
    close(sum_of_normalised(rewards, weights, 2, eps=0.0, correction=0), [-0.5, 0.5])
    # The lowest of four is left out of the statistics: mean 2, std sqrt(2/3); it still gets its advantage.
    column = torch.tensor([[1.0], [2.0], [3.0], [-9.0]])
    trimmed = sum_of_normalised(column, torch.ones(1), 4, eps=0.0, correction=0, trim=0.25)
    close(trimmed, [-(1.5**0.5), 0.0, 1.5**0.5, -11 * 1.5**0.5], atol=1e-5)


def test_gdpo_ends_with_unit_variance_and_ignores_scales():
    rewards = torch.rand(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([1.0, 0.3])
    advantage = gdpo(rewards, weights, 4)
    assert advantage.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert advantage.std(correction=0).item() == pytest.approx(1.0)
    torch.testing.assert_close(gdpo(rewards * torch.tensor([100.0, 0.01]), weights, 4), advantage)


def test_win_rate_by_hand():
    # 3 beats both, the two 1s beat nobody and tie each other.
    close(win_rate(torch.tensor([1.0, 3.0, 1.0]), 3), [0.25, 1.0, 0.25])
    close(win_rate(torch.tensor([5.0]), 1), [0.5])
    valid = torch.tensor([True, True, False])
    close(win_rate(torch.tensor([1.0, 3.0, 9.0]), 3, valid=valid), [0.0, 1.0, 0.5])


def test_win_rates_only_see_the_order():
    scores = torch.tensor([0.1, 0.5, 0.2, 7.0, 9.0, 8.0])
    torch.testing.assert_close(win_rate_advantage(scores, 3), win_rate_advantage(scores.exp(), 3))


def test_pairwise_preferences_agree_with_pointwise_scores():
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 4.0])
    split = scores.view(2, 3)
    preferences = torch.heaviside(split[:, :, None] - split[:, None, :], torch.tensor(0.5))
    torch.testing.assert_close(win_rate_advantage(preferences, 3), win_rate_advantage(scores, 3))
    valid = torch.tensor([True, False, True, True, True, True])
    torch.testing.assert_close(
        win_rate_advantage(preferences, 3, valid=valid), win_rate_advantage(scores, 3, valid=valid)
    )


def test_best_of_group_by_hand():
    rewards = torch.tensor([1.0, 2.0, 2.0, 5.0, 5.0, 5.0])
    close(best_of_group(rewards, 3), [0, 1, 1, 1, 1, 1])
    close(best_of_group(rewards, 3, valid=torch.tensor([True, False, False, False, True, True])), [1, 0, 0, 0, 1, 1])


def test_best_worst_signs_by_hand():
    close(best_worst_signs(torch.tensor([1.0, 3.0, 3.0, 1.0]), 4), [-1, 1, 0, 0])
    close(best_worst_signs(torch.tensor([2.0, 2.0, 2.0]), 3), [-1, 1, 0])
    close(best_worst_signs(torch.tensor([2.0]), 1), [0])
    valid = torch.tensor([False, True, True])
    close(best_worst_signs(torch.tensor([9.0, 1.0, 2.0]), 3, valid=valid), [0, -1, 1])


def test_best_worst_pairs_by_hand():
    pairs = best_worst_pairs(torch.tensor([1.0, 3.0, 3.0, 1.0, 7.0, 7.0, 7.0, 7.0]), 4)
    # First of the best, last of the worst: never the same rollout, even in a tied group.
    assert pairs.winner.tolist() == [1, 4]
    assert pairs.loser.tolist() == [3, 7]
    assert pairs.distinct.tolist() == [True, False]


def test_group_statistics_by_hand():
    rewards = torch.tensor([1.0, 3.0, 0.1, 0.1])
    close(group_std(rewards, 2), [1.0, 0.0])
    assert zero_std_ratio(rewards, 2) == 0.5
    close(reward_weights(rewards, valid=torch.tensor([True, True, True, False])), [1.0, 3.0, 0.1, 0.0])


def test_tracked_advantage_by_hand():
    rewards = torch.tensor([1.0, 3.0], dtype=torch.float64)
    first = tracked_advantage(rewards, ["a", "b"], {}, buffer_size=2, min_count=2, eps=0.0)
    close(first.advantage, [-1.0, 1.0])  # too little history: the batch's mean 2 and std 1
    again = tracked_advantage(rewards, ["a", "a"], first.history, buffer_size=2, min_count=2, eps=0.0)
    assert again.history == {"a": (1.0, 3.0), "b": (3.0,)}  # the oldest reward of "a" is forgotten
    assert first.history == {"a": (1.0,), "b": (3.0,)}  # and no history was changed in place


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: group_relative_advantage(r, 4), "group_size=4 does not divide the batch of 6"),
        (lambda r: group_relative_advantage(r, torch.zeros(5, dtype=torch.long)), r"group ids of shape \(5,\)"),
        (lambda r: group_relative_advantage(r, 3, valid=torch.ones(6)), "valid of shape"),
        (lambda r: group_relative_advantage(r, 3, std="batch"), "std='batch'"),
        (lambda r: step_gain(r, 3), "no gain"),
        (lambda r: gdpo(r.view(6, 1), torch.ones(2), 3), "weights of shape"),
        (lambda r: sum_of_normalised(r.view(6, 1), torch.ones(1), 3, trim=1.0), "trim=1.0"),
        (lambda r: win_rate_advantage(torch.rand(2, 3, 2), 3), "neither pointwise nor pairwise"),
        (lambda r: tracked_advantage(r, ["a"], {}), "1 prompts for 6 rewards"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.arange(6.0))
