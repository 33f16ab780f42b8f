"""Laws that every objective obeys, whatever its formula."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.interfaces import Objective
from rlt2i.objectives.awm import AWM
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.dppo import FlowDPPO
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.grpo_guard import GRPOGuard
from rlt2i.samplers.kernels import CPS, DDIM, DanceSDE, FlowSDE
from rlt2i.samplers.sde import SDE
from tests.helpers.build import UNIFORM, collect, learning_curve, toy_algorithm, toy_engine, toy_learner
from tests.helpers.objective_cases import (
    ALL,
    BACKPROP,
    NO_MAP,
    REVERSE,
    STAR,
    assert_same,
    experience_for,
    gradient,
    sampler_for,
    with_credit,
)

GRANULARITIES = ("sample", "token", "location")


@pytest.mark.parametrize("credit", [UNIFORM, STAR], ids=["uniform", "star"])
@pytest.mark.parametrize("name", ["guard", "dppo", "reinforce", "awm", "awm-location", "dgpo", "crd", "sft", *BACKPROP])
def test_learns(name: str, credit):
    algorithm = toy_algorithm(ALL[name], credit=credit, sampler=sampler_for(ALL[name]))
    rewards = learning_curve(algorithm, updates=10)
    # Before any learning the corner is as bright as the rest: reward 0.5.
    assert abs(rewards[0] - 0.5) < 0.02
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.01, rewards


# ---------------------------------------------------------------------------------------------------------- ratios


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), CPS(), DDIM(eta=0.7)], ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("ratio", GRANULARITIES)
@pytest.mark.parametrize("objective", [GRPOGuard, FlowDPPO, ClippedSurrogate])
def test_first_ratio_is_exactly_one(objective, ratio, kernel):
    algorithm = toy_algorithm(
        objective(ratio=ratio), credit=STAR, sampler=SDE(num_steps=6, window=(0, 5), kernel=kernel)
    )
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    metrics = toy_learner(algorithm).learn(experience)
    assert metrics["ratio/abs_minus_one_max"] == 0.0
    assert metrics["clip/high"] == metrics["clip/low"] == 0.0
    assert metrics.get("guard/bias", 0.0) == metrics.get("kl/old_max", 0.0) == 0.0


@pytest.mark.parametrize("ratio", GRANULARITIES)
def test_first_awm_ratio_is_exactly_one(ratio):
    algorithm = toy_algorithm(AWM(ratio=ratio), credit=STAR)
    metrics = toy_learner(algorithm).learn(collect(toy_engine(algorithm), prompts=2, group_size=4).experience)
    assert metrics["ratio/abs_minus_one_max"] == 0.0


@pytest.mark.parametrize("kernel", [FlowSDE(), CPS()], ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("objective", [GRPOGuard(), FlowDPPO()], ids=["guard", "dppo"])
def test_a_step_without_noise_is_harmless(objective, kernel):
    # The last step of CPS ends at sigma = 0 and has no noise at all.
    algorithm = toy_algorithm(objective, sampler=SDE(num_steps=4, window=(2, 4), kernel=kernel))
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    assert toy_learner(algorithm, optimizer_steps_per_iteration=2).learn(experience)["grad_norm"] > 0


# ------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("name", ALL)
def test_mix_zero_is_bit_equal_to_uniform_credit(name: str):
    objective = ALL[name]
    mixed = gradient(objective, experience_for(objective, NO_MAP))
    assert_same(mixed, gradient(objective, experience_for(objective, UNIFORM)), exactly=True)


@pytest.mark.parametrize("objective", [GRPOGuard, FlowDPPO, ClippedSurrogate])
@pytest.mark.parametrize("credit", [NO_MAP, STAR], ids=["constant", "star"])
def test_on_policy_gradient_is_the_same_at_every_granularity(objective, credit):
    experience = experience_for(objective(), credit)
    reference = gradient(objective(ratio="location"), experience)
    for ratio in ("token", "sample"):
        assert_same(gradient(objective(ratio=ratio), experience), reference)


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2"])
def test_linear_awm_is_the_same_at_every_granularity_and_huber_is_not(weighting):
    experience = experience_for(AWM(), STAR)
    reference = gradient(AWM(ratio="sample", weighting=weighting), experience)
    assert_same(gradient(AWM(ratio="location", weighting=weighting), experience), reference)
    sample, place = (gradient(AWM(ratio=r, weighting="huber"), experience) for r in ("sample", "location"))
    assert not torch.allclose(sample["image"], place["image"], rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_a_map_moves_the_gradient(name: str):
    objective = ALL[name]
    uniform, star = (gradient(objective, experience_for(objective, c)) for c in (UNIFORM, STAR))
    assert not torch.allclose(uniform["image"], star["image"], rtol=1e-3, atol=0)


# ------------------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("name", ALL)
def test_masked_steps_do_not_change_the_others(name: str):
    objective = ALL[name]
    experience = experience_for(objective)
    advantage = experience.credit.advantage.expand(-1, 6, 1, 1).clone()
    mask = torch.tensor([True, False, True, False, True, True]).view(1, 6, 1, 1)
    kept = gradient(objective, with_credit(experience, advantage=advantage, mask=mask))
    changed = torch.where(mask, advantage, -3 * advantage)
    assert_same(gradient(objective, with_credit(experience, advantage=changed, mask=mask)), kept, exactly=True)


@pytest.mark.parametrize("name", REVERSE)
def test_a_mask_divides_by_what_is_left(name: str):
    # Three stochastic steps: the mean over all is the mean of two weighted by 2/3 and that of the third by 1/3.
    objective = REVERSE[name]
    experience = experience_for(objective)
    first = torch.tensor([True, True, False, True, True, True]).view(1, 6, 1, 1)
    two = gradient(objective, with_credit(experience, mask=first))
    one = gradient(objective, with_credit(experience, mask=~first))
    whole = gradient(objective, experience)
    assert_same({k: 2 / 3 * two[k] + 1 / 3 * one[k] for k in whole}, whole)


@pytest.mark.parametrize("name", [*(n for n in ALL if n not in BACKPROP), "guard-location", "clipped-sample"])
def test_masked_places_leave_loss_and_denominator(name: str):
    # Half of the places masked and the rest at weight 1 is the same as weight 2 there and 0 elsewhere.
    objective = {
        "guard-location": GRPOGuard(ratio="location"),
        "clipped-sample": ClippedSurrogate(ratio="sample"),
    }.get(name) or ALL[name]
    experience = experience_for(objective)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    masked = gradient(objective, with_credit(experience, mask=mask))
    assert_same(gradient(objective, with_credit(experience, weight=2.0 * mask)), masked)


# ------------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_do_not_change_the_gradient(name: str):
    objective = ALL[name]
    experience = experience_for(objective, STAR)
    assert_same(gradient(objective, experience, sequences=7), gradient(objective, experience))


@pytest.mark.parametrize("name", [*REVERSE, "nft", "awm", "awm-location", "sft"])
def test_halving_credit_halves_the_on_policy_gradient(name: str):
    objective = ALL[name]
    experience = experience_for(objective)
    whole = gradient(objective, experience)
    half = gradient(objective, with_credit(experience, advantage=experience.credit.advantage / 2))
    assert_same({k: 2 * v for k, v in half.items()}, whole)


@pytest.mark.parametrize("name", ALL)
def test_credit_of_every_resolution_is_accepted(name: str):
    objective = ALL[name]
    experience = experience_for(objective, group_size=4)
    generator = torch.Generator().manual_seed(0)
    for shape in [(8, 6, 4, 4), (8, 1, 8, 8), (1, 6, 1, 1), (8, 6, 2, 2)]:
        weight = torch.rand(shape, generator=generator) + 0.5
        advantage = experience.credit.advantage * (torch.rand(8, *shape[1:], generator=generator) + 0.5)
        found = gradient(objective, with_credit(experience, advantage=advantage, weight=weight / weight.mean()))
        assert all(torch.isfinite(g).all() for g in found.values())
        assert found["image"].abs().sum() > 0


@pytest.mark.parametrize("objective", [ALL["nft"], ALL["awm"], ALL["dgpo"], ALL["crd"], ALL["sft"]])
@pytest.mark.parametrize("grid", ["rollout", "stratified"])
def test_forward_objectives_train_at_sampler_steps(objective: Objective, grid):
    at_steps = attrs.evolve(objective, sigmas=SigmaDraws(count=3, grid=grid, steps=(1, 5)))  # type: ignore[call-arg]
    algorithm = toy_algorithm(at_steps, sampler=sampler_for(objective))
    metrics = toy_learner(algorithm).learn(collect(toy_engine(algorithm), prompts=2, group_size=4).experience)
    assert metrics["grad_norm"] > 0
