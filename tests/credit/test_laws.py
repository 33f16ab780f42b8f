"""Laws that every advantage, allocation and mask obeys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt2i.credit.algebra import Advantage, Allocation, Mask, Product
from rlt2i.credit.best_of_group import BestOfGroup
from rlt2i.credit.coca import CoCA
from rlt2i.credit.completion_gain import CompletionGain
from rlt2i.credit.gdpo import GDPO
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.influence import Influence
from rlt2i.credit.inverse_dt import InverseDt
from rlt2i.credit.noise_aware import NoiseAware
from rlt2i.credit.proportional_dt import ProportionalDt
from rlt2i.credit.random_subset import RandomSubset
from rlt2i.credit.random_window import RandomWindow
from rlt2i.credit.region_maps import RegionMaps
from rlt2i.credit.relative_l1_chunks import RelativeL1Chunks
from rlt2i.credit.residual_contrast import ResidualContrast
from rlt2i.credit.reward_saliency import RewardSaliency
from rlt2i.credit.rwr import RewardWeights
from rlt2i.credit.sliding_window import SlidingWindow
from rlt2i.credit.turning_points import TurningPoints
from rlt2i.credit.win_rate import WinRate
from rlt2i.interfaces import CreditContext
from rlt2i.types import CAUSALITIES, Region
from tests.helpers.credit_contexts import make_context, permuted

P, G, T = 2, 4, 4
COMPARING: list[Advantage] = [
    GroupRelative(),
    GDPO(weights={"a": 1.0, "b": -0.5}),
    WinRate(),
    CompletionGain(),
    TurningPoints(),
    CoCA(alpha=0.3),
]
LABELS: list[Advantage] = [RewardWeights(), BestOfGroup()]
ALLOCATIONS: list[Allocation] = [
    NoiseAware(),
    InverseDt(),
    ProportionalDt(),
    RelativeL1Chunks(num_chunks=2),
    RegionMaps(),
    RegionMaps(signs="all", mix=1.0),
    ResidualContrast(),
    RewardSaliency(),
    RewardSaliency(at="predictions", form="gradient_times_input"),
    Influence(blocks=2),
]
MASKS: list[Mask] = [SlidingWindow(width=2, period=3), RandomWindow(width=2), RandomSubset()]
name = lambda part: type(part).__name__

# Few distinct values, so that ties and tied groups are common.
scores = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 3.0]), min_size=P * G, max_size=P * G)
validity = st.lists(st.booleans(), min_size=P * G, max_size=P * G)
few = settings(max_examples=12, deadline=None)


def build(rewards: list[float], valid: list[bool] | None = None, seed: int = 0) -> CreditContext:
    draw = torch.Generator().manual_seed(seed)
    boxes = (torch.rand(P * G, 2, generator=draw) * 0.6).tolist()
    regions = [
        [Region(box=(x, y, x + 0.4, y + 0.4), credit=1.0), Region(box=(y, x, y + 0.3, x + 0.3), credit=-0.5)]
        for x, y in boxes
    ]
    terms = {"a": rewards, "b": torch.rand(P * G, generator=draw).round(decimals=1).tolist()}
    return make_context(rewards, group_size=G, valid=valid, terms=terms, regions=regions, num_steps=T, seed=seed)


def tied(seed: int = 0) -> CreditContext:
    """Everything that can be judged is equal in the first group, and nothing in the second."""
    context = build([0.7] * G + [0.0, 1.0, 2.0, 3.0], seed=seed)
    context.rewards.terms["b"][:G] = 0.1
    latents = context.trajectory.latents
    latents[:G] = latents[:1]  # so are the completions, which are scored where they stand
    return context


@pytest.mark.parametrize("part", COMPARING, ids=name)
def test_a_tied_group_gets_exactly_nothing(part: Advantage):
    advantage = part.advantage(tied())
    assert (advantage[:G] == 0).all()
    assert (advantage[G:] != 0).any()


@pytest.mark.parametrize("part", COMPARING, ids=name)
@given(rewards=scores, valid=validity, seed=st.integers(0, 5))
@few
def test_groups_have_mean_zero_and_invalid_rollouts_get_nothing(part, rewards, valid, seed):
    advantage = part.advantage(build(rewards, valid, seed))
    assert advantage.shape[0] == P * G
    assert advantage.shape[1] in (1, T)
    assert torch.isfinite(advantage).all()
    assert (advantage[~torch.tensor(valid)] == 0).all()
    means = advantage.view(P, G, -1).mean(dim=1)
    torch.testing.assert_close(means, torch.zeros_like(means), atol=1e-4, rtol=0)


@pytest.mark.parametrize("part", LABELS, ids=name)
@given(rewards=scores, valid=validity)
@few
def test_labels_are_finite_and_leave_invalid_rollouts_out(part, rewards, valid):
    advantage = part.advantage(build(rewards, valid))
    assert advantage.shape == (P * G, 1, 1, 1)
    assert torch.isfinite(advantage).all()
    assert (advantage[~torch.tensor(valid)] == 0).all()


@pytest.mark.parametrize("part", ALLOCATIONS, ids=name)
@given(rewards=scores, valid=validity, seed=st.integers(0, 5))
@few
def test_weights_are_finite_non_negative_and_have_mean_one(part, rewards, valid, seed):
    context = build(rewards, valid, seed)
    weight = part.weight(context)
    assert part.causality in CAUSALITIES
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()
    if weight.shape[2:] == (1, 1):
        over, trained = weight.mean(dim=1), weight[:, context.trajectory.stochastic].mean(dim=1)
        torch.testing.assert_close(trained, torch.ones_like(trained))
    else:
        over = weight.mean(dim=(2, 3))
    torch.testing.assert_close(over, torch.ones_like(over))


ORDER = torch.tensor([6, 4, 7, 5, 1, 0, 3, 2])


@pytest.mark.parametrize("part", [*COMPARING, *LABELS], ids=name)
def test_advantages_permute_with_rollouts(part: Advantage):
    context = build([0.0, 1.0, 0.25, 3.0, 0.5, 0.5, -1.0, 0.25])
    torch.testing.assert_close(part.advantage(permuted(context, ORDER)), part.advantage(context)[ORDER])


@pytest.mark.parametrize("part", ALLOCATIONS, ids=name)
def test_weights_permute_with_rollouts(part: Allocation):
    context = build([0.0, 1.0, 0.25, 3.0, 0.5, 0.5, -1.0, 0.25])
    weight = part.weight(context)
    expected = weight if len(weight) == 1 else weight[ORDER]
    torch.testing.assert_close(part.weight(permuted(context, ORDER)), expected)


@pytest.mark.parametrize("part", MASKS, ids=name)
@given(iteration=st.integers(0, 1000), seed=st.integers(0, 1000), first=st.integers(0, 2), last=st.integers(4, 6))
@few
def test_masks_are_never_empty_and_stay_on_stochastic_steps(part, iteration, seed, first, last):
    stochastic = tuple(range(first, last))
    context = make_context([0.0] * 4, group_size=2, num_steps=6, stochastic=stochastic, iteration=iteration, seed=seed)
    mask = part.mask(context)
    assert mask.dtype is torch.bool
    assert mask.any(dim=1).all()
    assert not mask[:, ~context.trajectory.stochastic].any()
    # A deterministic rollout is trained anywhere.
    anywhere = make_context([0.0] * 4, group_size=2, num_steps=6, stochastic=(), iteration=iteration, seed=seed)
    assert part.mask(anywhere).any(dim=1).all()


@pytest.mark.parametrize("part", MASKS, ids=name)
def test_masks_are_functions_of_iteration_and_generator(part: Mask):
    draw = lambda: part.mask(make_context([0.0] * 4, group_size=2, num_steps=6, iteration=7, seed=3))
    assert torch.equal(draw(), draw())


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=name)
@pytest.mark.parametrize("advantage", [*COMPARING, *LABELS], ids=name)
def test_every_advantage_multiplies_every_allocation(advantage: Advantage, allocation: Allocation):
    credit = Product(advantage=advantage, allocations=(allocation, NoiseAware()), masks=(RandomSubset(),))
    found = credit.assign(build([0.0, 1.0, 0.25, 3.0, 0.5, 0.5, -1.0, 0.25]))
    assert not any(field.requires_grad for field in (found.advantage, found.weight, found.mask))
    assert found.causality == allocation.causality
    mean = found.weight.mean(dim=(1, 2, 3))
    torch.testing.assert_close(mean, torch.ones_like(mean))
