"""Rounding is no preference, and no size of reward is too large: for every advantage."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.credit.residual_contrast import ResidualContrast
from rlt2i.functional.advantages import best_of_group, gdpo, group_relative_advantage, group_std, step_gain, win_rate
from rlt2i.functional.branching import edge_advantage
from rlt2i.functional.groups import masked_std
from rlt2i.functional.step_credit import turning_point_reward, turning_points
from tests.credit.test_laws import COMPARING, build, name
from tests.helpers.credit_contexts import make_context

ULP = [20.0, 20.000002, 20.0, 20.0]
"""Four equal rewards, one of which was summed in another order."""


def test_gdpo_of_one_ulp_is_nothing():
    assert (gdpo(torch.tensor(ULP)[:, None], torch.ones(1), 4) == 0).all()


@pytest.mark.parametrize("scale", [1e30, 1e6, 1e-3, 1e-6, 1e-12, -1.0, -1e6])
def test_gdpo_of_one_ulp_is_nothing_in_any_unit_and_beside_any_other_reward(scale):
    tie, other = torch.tensor(ULP) * scale, torch.tensor([1.0, 1.0, 1.0, 2.0])
    assert (gdpo(tie[:, None], torch.ones(1), 4) == 0).all()
    both = gdpo(torch.stack([tie, other], dim=1), torch.ones(2), 4)
    torch.testing.assert_close(both, gdpo(other[:, None], torch.ones(1), 4))


@pytest.mark.parametrize("shift", [0.0, 20.0, -1000.0])
def test_gdpo_of_rewards_that_cancel_is_nothing(shift):
    # Two rewards that always disagree: what is left of their sum is how each was rounded.
    reward = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.7, 0.1, 0.3, 0.9])
    assert (gdpo(torch.stack([reward + shift, -3 * reward], dim=1), torch.ones(2), 4) == 0).all()
    apart = torch.stack([reward + shift, -3 * reward.flip(0)], dim=1)
    assert (gdpo(apart, torch.ones(2), 4) != 0).all()


@pytest.mark.parametrize("std", ["group", "global"])
def test_group_relative_of_one_ulp_is_nothing(std):
    advantage = group_relative_advantage(torch.tensor([*ULP, 1.0, 2.0, 3.0, 4.0]), 4, std=std, eps=1e-12)
    assert (advantage[:4] == 0).all()
    assert (advantage[4:] != 0).all()


def test_every_rule_over_a_group_sees_a_tie():
    rewards = torch.tensor(ULP)
    assert group_std(rewards, 4).tolist() == [0.0]
    assert best_of_group(rewards, 4).tolist() == [1.0] * 4
    assert win_rate(rewards, 4).tolist() == [0.5] * 4
    assert (edge_advantage(rewards, torch.arange(4)[:, None], 4, eps=1e-12) == 0).all()


def test_a_gain_carries_the_rounding_of_the_rewards_it_is_the_difference_of():
    # 1000 -> 1001, once with the last bit of 1000 wrong: gains of 1 and .99994.
    values = torch.tensor([[1000.0, 1001.0], [1000.00006, 1001.0]])
    assert (step_gain(values, 2, eps=1e-12) == 0).all()
    assert (step_gain(torch.tensor([[1000.0, 1001.0], [1000.1, 1001.0]]), 2, eps=1e-12) != 0).all()


def test_a_wrong_last_bit_is_no_turning_point():
    # A fall of one ulp and then a rise: without the rounding nothing fell.
    ode, steps, final = torch.tensor([20.0]), torch.tensor([[19.999998, 21.0]]), torch.tensor([21.0])
    points = turning_points(ode, steps, final, consistent_later=False)
    assert not points.any()
    assert turning_point_reward(ode, steps, final, points).gain.tolist() == [[0.0, pytest.approx(1.0, abs=1e-5)]]


def test_small_rewards_keep_their_differences():
    rewards = torch.tensor([1e-12, 2e-12])
    assert group_relative_advantage(rewards, 2, eps=0.0).tolist() == pytest.approx([-1.0, 1.0])
    advantage = edge_advantage(rewards, torch.arange(2)[:, None], 2, eps=1e-20)
    assert advantage.flatten().tolist() == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("part", COMPARING, ids=name)
@pytest.mark.parametrize("scale", [1e30, 1e-3])
def test_an_advantage_does_not_know_the_unit_of_the_reward(part, scale):
    # eps is published in units of the reward, so it is out of the way here.
    part = attrs.evolve(part, **{key: 1e-12 for key in ("eps", "min_std") if key in attrs.fields_dict(type(part))})
    plain = build([0.0, 1.0, 0.25, 3.0, 0.5, 0.5, -1.0, 0.25])
    rewards = plain.rewards
    scaled = attrs.evolve(
        plain,
        rewards=attrs.evolve(
            rewards, values=rewards.values * scale, terms={key: term * scale for key, term in rewards.terms.items()}
        ),
        score=lambda latents, rows: (lambda output: attrs.evolve(output, scores=output.scores * scale))(
            plain.score(latents, rows)
        ),
    )
    expected = part.advantage(plain)
    assert (expected != 0).any()
    torch.testing.assert_close(part.advantage(scaled), expected, rtol=1e-3, atol=1e-3)


def test_a_spread_is_the_same_number_in_every_unit():
    values = torch.tensor([[1.0, 2.0, 4.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    spread = masked_std(values, mask, 1, correction=0)
    for exponent in (-90, 100):
        assert torch.equal(masked_std(values * 2.0**exponent, mask, 1, correction=0), spread * 2.0**exponent)
    assert masked_std(torch.full((1, 3), 7.0), mask, 1, correction=0).item() == 0


def test_a_tie_up_to_rounding_has_no_other_end():
    # Residual contrast compares the best with the worst: here there is neither.
    assert (ResidualContrast().weight(make_context(ULP, group_size=4)) == 1).all()
