"""Advantages on paper."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from rlt2i.credit.algebra import Advantage
from rlt2i.credit.best_of_group import BestOfGroup
from rlt2i.credit.coca import CoCA
from rlt2i.credit.completion_gain import CompletionGain
from rlt2i.credit.gdpo import GDPO
from rlt2i.credit.rwr import RewardWeights
from rlt2i.credit.turning_points import TurningPoints
from rlt2i.credit.win_rate import WinRate
from rlt2i.functional.step_credit import clean_similarity, coca_advantage, coca_contribution
from rlt2i.interfaces import CreditContext
from tests.helpers.credit_contexts import make_context

NAN = float("nan")


def rows(advantage: Advantage, context: CreditContext) -> list[list[float]]:
    return advantage.advantage(context)[:, :, 0, 0].tolist()


def expect(advantage: Advantage, context: CreditContext, expected: list[list[float]]) -> None:
    torch.testing.assert_close(
        torch.tensor(rows(advantage, context)), torch.tensor(expected), atol=2e-3, rtol=0, check_dtype=False
    )


def test_gdpo_by_hand():
    # a: +-1 in both groups; b: +-1 in the first, tied in the second. s = a + b: 2, -2, 1, -1; its std is sqrt(5/2).
    terms = {"a": [3.0, 1.0, 9.0, 5.0], "b": [0.2, 0.1, 7.0, 7.0]}
    context = make_context([0.0] * 4, group_size=2, terms=terms)
    std = 2.5**0.5
    expect(GDPO(weights={"a": 1.0, "b": 1.0}), context, [[2 / std], [-2 / std], [1 / std], [-1 / std]])
    # Twice the weight of b: 3, -3, 1, -1 with std sqrt(5).
    expect(GDPO(weights={"a": 1.0, "b": 2.0}), context, [[3 / 5**0.5], [-3 / 5**0.5], [1 / 5**0.5], [-1 / 5**0.5]])


def test_gdpo_takes_nan_terms_for_what_they_are():
    # "count" does not apply to the first prompt, so it adds nothing there; in the second, one rollout was not judged.
    terms = {"a": [3.0, 1.0, 9.0, 5.0, 1.0, 1.0], "count": [NAN, NAN, NAN, 1.0, 1.0, 0.0]}
    found = rows(GDPO(weights={"a": 1.0, "count": 1.0}), make_context([0.0] * 6, group_size=2, terms=terms))
    assert found[0][0] > 0 > found[1][0]
    assert found[2] == [0.0]
    assert found[3] == [0.0]  # alone among those judged, so tied
    assert found[4][0] > 0 > found[5][0]


def test_gdpo_sees_the_batch_of_all_processes():
    terms = {"a": [3.0, 1.0, 9.0, 5.0, 2.0, 2.0, 8.0, 1.0]}
    whole = make_context([0.0] * 8, group_size=2, terms=terms)
    half = make_context([0.0] * 4, group_size=2, terms={"a": terms["a"][4:]})
    together = {4: torch.tensor(terms["a"])[:, None]}
    second = attrs.evolve(half, rank=1, gather=lambda t: together[len(t)] if t.is_floating_point() else t.repeat(2))
    assert rows(GDPO(weights={"a": 1.0}), second) == rows(GDPO(weights={"a": 1.0}), whole)[4:]


def test_gdpo_refuses_what_it_cannot_add():
    with pytest.raises(ValueError, match="at least one reward term"):
        GDPO(weights={})
    with pytest.raises(ValueError, match="leave the term out"):
        GDPO(weights={"a": 0.0})
    with pytest.raises(ValueError, match=r"no term \['b'\]. It has \['a'\]"):
        GDPO(weights={"b": 1.0}).advantage(make_context([0.0, 1.0], group_size=2, terms={"a": [0.0, 1.0]}))


def test_reward_weights_are_the_rewards_and_best_of_group_its_labels():
    context = make_context([0.5, -2.0, 3.0, 3.0], group_size=2, valid=[True, True, True, False])
    assert rows(RewardWeights(), context) == [[0.5], [-2.0], [3.0], [0.0]]
    assert rows(BestOfGroup(), context) == [[1.0], [0.0], [1.0], [0.0]]
    assert rows(BestOfGroup(), make_context([3.0, 3.0], group_size=2)) == [[1.0], [1.0]]  # ties are all best


def test_win_rates_do_not_see_how_much_was_won():
    # Of three: beats two, one, none: rates 1, 1/2, 0 with std sqrt(1/6).
    unit = (3 / 2) ** 0.5
    for scores in ([9.0, 1.0, 0.0], [3.0, 2.0, 1.0]):
        expect(WinRate(), make_context(scores, group_size=3), [[unit], [0.0], [-unit]])


def test_pairwise_win_rates_come_from_the_reward():
    # Rock, paper, scissors: everybody beats one and loses to one.
    cycle = {"judge/0": [NAN, 1.0, 0.0], "judge/1": [0.0, NAN, 1.0], "judge/2": [1.0, 0.0, NAN]}
    assert rows(WinRate(pairwise="judge"), make_context([5.0, 1.0, 0.0], group_size=3, terms=cycle)) == [[0.0]] * 3
    # The judge knows that 0 beats both and does not say who wins between 1 and 2: rates 1, 1/4, 1/4, std sqrt(1/8).
    known = {"judge/0": [NAN, 0.0, 0.0], "judge/1": [1.0, NAN, NAN], "judge/2": [1.0, NAN, NAN]}
    context = make_context([0.0, 1.0, 5.0], group_size=3, terms=known)
    expect(WinRate(pairwise="judge"), context, [[2**0.5], [-(0.5**0.5)], [-(0.5**0.5)]])
    with pytest.raises(ValueError, match="no term 'other/0'"):
        WinRate(pairwise="other").advantage(context)


def along(values: Tensor) -> object:
    """Completions whose rewards are a table [B, T]."""
    return lambda step, rollouts: values[rollouts, step]


def test_completion_gain_by_hand():
    # Rewards of the completions before steps 0, 2 (the stochastic ones) and of the image: gains 2, 1 and 0, 3.
    values = torch.tensor([[1.0, NAN, 3.0, NAN], [1.0, NAN, 1.0, NAN]])
    context = make_context([4.0, 4.0], group_size=2, stochastic=(0, 2), completed=along(values))
    expect(CompletionGain(), context, [[1.0, 0.0, -1.0, 0.0], [-1.0, 0.0, 1.0, 0.0]])


def test_a_completion_that_cannot_be_scored_makes_its_rollout_invalid():
    values = torch.tensor([[1.0, 3.0], [1.0, NAN], [1.0, 1.0]])
    context = make_context([4.0, 0.0, 5.0], group_size=3, num_steps=2, stochastic=(0, 1), completed=along(values))
    expect(CompletionGain(), context, [[1.0, -1.0], [0.0, 0.0], [-1.0, 1.0]])


def test_shared_initial_noise_is_completed_once_per_group():
    latents = torch.randn(4, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    latents[1, 0], latents[3, 0] = latents[0, 0], latents[2, 0]
    calls = []
    context = make_context([1.0, 2.0, 3.0, 4.0], group_size=2, latents=latents)
    counted = attrs.evolve(
        context, complete=lambda states, step, rollouts: calls.append((step, rollouts.tolist())) or states
    )
    CompletionGain().advantage(counted)
    assert calls == [(0, [0, 2]), (1, [0, 1, 2, 3]), (2, [0, 1, 2, 3])]


@pytest.mark.parametrize("part", [CompletionGain(), TurningPoints()], ids=lambda part: type(part).__name__)
def test_step_rewards_of_a_deterministic_rollout_are_refused(part: Advantage):
    with pytest.raises(ValueError, match=f"{type(part).__name__}: the rollout is deterministic.*such as SDE"):
        part.advantage(make_context([0.0, 1.0], group_size=2, stochastic=()))


def test_turning_points_by_hand():
    # Before the three noisy steps 0, 1, -1 and at the end 3 (gains 1, -2, 4, rising): the first step turns and is given
    # what remained, 3 - 0 = 3; the last one ends the rollout, where "still to come" has no sign. Rewards 3, -2, 4.
    # The other rollout gains nothing: 0, 0, 0.
    values = torch.tensor([[0.0, 1.0, -1.0, NAN], [0.0, 0.0, 0.0, NAN]])
    context = make_context([3.0, 0.0], group_size=2, completed=along(values))
    expect(TurningPoints(balance=False), context, [[1.0, -1.0, 1.0, 0.0], [-1.0, 1.0, -1.0, 0.0]])
    three = torch.tensor([[0.0, 1.0, -1.0, NAN], [0.0, 2.0, 2.0, NAN], [0.0, 2.0, 2.0, NAN]])
    # The others gain 2 at the first step and lose it again: their first step does not turn, its reward stays 2. So
    # the bonus puts the first rollout, which gained 1, ahead of them: 3, 2, 2.
    context = make_context([3.0, 0.0, 0.0], group_size=3, completed=along(three))
    found = rows(TurningPoints(balance=False), context)
    assert found[0][0] == pytest.approx(2**0.5, abs=1e-3)
    assert found[0][0] > 0 > found[1][0]


def test_balancing_drops_the_turning_points_of_the_smaller_changes():
    # Two rising rollouts turn at the first step and one falling: the weaker rising one loses its bonus.
    values = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0]])
    context = make_context([5.0, 3.0, -4.0, 0.0], group_size=4, num_steps=2, stochastic=(0, 1), completed=along(values))
    given = torch.tensor([5.0, 1.0, -4.0, 0.0])  # instead of 5, 3, -4, 0
    expected = (given - given.mean()) / given.std(correction=0)
    torch.testing.assert_close(torch.tensor(rows(TurningPoints(), context))[:, 0], expected, atol=1e-3, rtol=0)


def test_coca_by_hand():
    # Clean predictions at 90 degrees, 60 degrees and on the image: contributions 1/2 and 1/2, still to come 1 and 1/2.
    context = make_context([1.0, 0.0], group_size=2, num_steps=2, stochastic=(0, 1))
    image = torch.zeros(2, 2, 4, 4)
    image[:, 0] = 1.0
    side = torch.zeros_like(image)
    side[:, 1] = 1.0
    latents = torch.stack([image, image, image], dim=1)
    predictions = torch.stack([side, 0.5 * image + 0.75**0.5 * side], dim=1)
    trajectory = attrs.evolve(context.trajectory, latents=latents, captures={"clean_predictions": predictions})
    context = attrs.evolve(context, trajectory=trajectory)
    # With two rollouts the second normalisation restores +-1 at every step; who contributed less stands out in a group.
    expect(CoCA(), context, [[1.0, 1.0], [-1.0, -1.0]])
    late = attrs.evolve(trajectory, captures={"clean_predictions": torch.stack([side, side], dim=1)})
    twice = {
        "latents": torch.cat([latents, latents]),
        "captures": {"clean_predictions": torch.cat([predictions, late.captures["clean_predictions"]])},
    }
    four = make_context([1.0, 0.0, 1.0, 0.0], group_size=4, num_steps=2, stochastic=(0, 1))
    four = attrs.evolve(four, trajectory=attrs.evolve(four.trajectory, **twice))
    found = torch.tensor(rows(CoCA(), four))
    # At the last step half is still to come for the first pair and all of it for the second: A is +-1/2 and +-1.
    ratio = found[2, 1] / found[0, 1]
    assert float(ratio) == pytest.approx(2.0, abs=1e-3)
    torch.testing.assert_close(found[:, 0].abs(), torch.ones(4), atol=1e-3, rtol=0)


def test_coca_bounds_the_outcome_before_it_is_spread():
    # Nine rollouts fail and one succeeds: its advantage is 3, nine times that of the others. Bounded at 1 it is three
    # times theirs, which shows where the rollouts contributed at different steps.
    context = make_context([0.0] * 9 + [1.0], group_size=10, num_steps=3, stochastic=(0, 1, 2))
    predictions, final = context.trajectory.captures["clean_predictions"], context.trajectory.clean_latents
    contribution = coca_contribution(clean_similarity(predictions, final))
    outcome = torch.tensor([-1 / 3] * 9 + [1.0])
    spread = coca_advantage(outcome, contribution, 10, alpha=0.5).clamp(-1, 1)
    expect(CoCA(alpha=0.5, clip=1.0), context, spread.tolist())
    unbounded = coca_advantage(torch.tensor([-1 / 3] * 9 + [3.0]), contribution, 10, alpha=0.5).clamp(-1, 1)
    assert not torch.allclose(unbounded, spread, atol=1e-2)
