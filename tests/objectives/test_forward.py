"""AWM, DGPO, CRD and weighted matching: by hand, and what they refuse."""

from __future__ import annotations

import math

import attrs
import pytest
import torch

from rlt2i.functional.group_matching import dgpo_group_weight
from rlt2i.objectives.awm import AWM
from rlt2i.objectives.crd import CRD
from rlt2i.objectives.dgpo import DGPO
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.forward import noisy_pairs, whole_groups
from rlt2i.objectives.penalty import VelocityPenalty
from rlt2i.objectives.sft import WeightedMatching
from tests.helpers.build import collect, toy_algorithm, toy_engine, toy_learner
from tests.helpers.objective_cases import FLOW, assert_same, experience_for, gradient, with_credit


def evaluate(objective, *, moved: float = 0.0, on_policy: bool = True, group_size: int = 4, sequences: int = 1000):
    """(experience, errors [B, draws, H, W] at the objective's own draws with shared noise, losses)."""
    algorithm = toy_algorithm(objective, sampler=FLOW)
    experience = collect(toy_engine(algorithm), prompts=2, group_size=group_size).experience
    learner = toy_learner(algorithm, micro_batch_size=sequences)
    with torch.no_grad():
        algorithm.policy.image.add_(moved)
    context = learner._context(experience.num_rollouts, 2, on_policy=on_policy)
    sigma, step = objective.sigmas.draw(experience, experience.groups, context=context)
    errors, anchors = [], []
    for draw in range(objective.sigmas.count):
        rows = torch.arange(experience.num_rollouts)
        noisy = noisy_pairs(
            experience, rows, torch.full_like(rows, draw), sigma=sigma, step=step,
            noise_keys=experience.groups, context=context,
        )  # fmt: skip
        with torch.no_grad():
            errors.append(noisy.error(noisy.velocity(algorithm.policy)))
        if "reference" in learner.sets.names:
            anchors.append(noisy.error(noisy.velocity_under("reference", algorithm.policy, context)))
    losses = list(objective.losses(algorithm.policy, experience, context=context))
    return experience, torch.stack(errors, dim=1), anchors, losses


def total(losses) -> float:
    return sum(float(loss.value.detach()) for loss in losses)


def test_dgpo_by_hand():
    # Policy and anchor agree at the start, so every group weighs sigmoid(0) = 1/2.
    experience, errors, _, losses = evaluate(DGPO(clip_range=None))
    advantage = experience.credit.advantage.flatten()
    by_hand = (0.5 * advantage[:, None] * errors.mean(dim=(2, 3))).mean()
    assert total(losses) == pytest.approx(float(by_hand), rel=1e-4)
    assert all(torch.equal(loss.metrics["dgpo/group_weight"], torch.full((8,), 0.5)) for loss in losses)


def test_dgpo_group_weight_by_hand():
    experience, errors, anchors, losses = evaluate(DGPO(clip_range=None), moved=0.3)
    advantage = experience.credit.advantage.flatten()
    for draw, loss in enumerate(losses):
        by_hand = dgpo_group_weight(errors[:, draw], anchors[draw], advantage, 4)
        torch.testing.assert_close(loss.metrics["dgpo/group_weight"], by_hand, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(by_hand, torch.full((8,), 0.5))


def test_dgpo_averages_over_the_whole_group_even_where_a_rollout_has_no_advantage():
    # The learner does not hand over rollouts without advantage; they still count in the mean of G.
    objective = DGPO(clip_range=None, beta=1.0)
    algorithm = toy_algorithm(objective, sampler=FLOW)
    experience = collect(toy_engine(algorithm), prompts=1, group_size=4).experience
    advantage = torch.tensor([1.0, 0.0, -1.0, 0.0]).view(4, 1, 1, 1)
    experience = with_credit(experience, advantage=advantage)
    learner = toy_learner(algorithm)
    with torch.no_grad():
        algorithm.policy.image.add_(0.5 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    context = learner._context(4, 1, on_policy=True)
    informative = experience.take(torch.tensor([0, 2]))
    with_all = list(objective.losses(algorithm.policy, experience, context=context))
    without = list(objective.losses(algorithm.policy, informative, context=context))
    for whole, part in zip(with_all, without, strict=True):
        torch.testing.assert_close(
            part.metrics["dgpo/group_weight"], whole.metrics["dgpo/group_weight"][[0, 2]], rtol=1e-5, atol=1e-7
        )


def test_dgpo_stops_samples_that_have_learned_enough():
    experience, _, _, losses = evaluate(DGPO(clip_range=1e-9), moved=0.3)
    high = torch.stack([loss.metrics["clip/high"] for loss in losses])
    low = torch.stack([loss.metrics["clip/low"] for loss in losses])
    praised = experience.credit.advantage.flatten() > 0
    assert (high.sum() + low.sum()) > 0
    assert not high[:, ~praised].any()
    assert not low[:, praised].any()


def test_crd_by_hand():
    # At the old policy r = 0 and its centred square is that of the label: A / 10 minus its group mean, which is 0.
    experience, _, _, losses = evaluate(CRD())
    advantage = experience.credit.advantage.flatten()
    by_hand = 5 * (advantage / 10).pow(2).mean()
    assert total(losses) == pytest.approx(float(by_hand), rel=1e-4)


def test_crd_centres_in_the_group_or_in_the_micro_batch():
    # One group praised, one blamed: the centres of the groups hide it, that of both together does not.
    def loss(centre) -> float:
        objective = CRD(centre=centre)
        algorithm = toy_algorithm(objective, sampler=FLOW)
        experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
        advantage = torch.tensor([1.0] * 4 + [-1.0] * 4).view(8, 1, 1, 1)
        experience = with_credit(experience, advantage=advantage)
        context = toy_learner(algorithm)._context(8, 2, on_policy=True)
        return total(objective.losses(algorithm.policy, experience, context=context))

    assert loss("group") == pytest.approx(0.0, abs=1e-10)
    assert loss("micro_batch") == pytest.approx(5 * 0.1**2, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"form": "bce"}, {"temperature": 0.5}, {"adaptive": False}, {"kl_penalty": VelocityPenalty(weight=0.1)}],
)
def test_crd_variants_update(options):
    algorithm = toy_algorithm(CRD(**options), sampler=FLOW)
    metrics = toy_learner(algorithm).learn(collect(toy_engine(algorithm), prompts=2, group_size=4).experience)
    assert metrics["grad_norm"] > 0


def test_uniform_awm_is_a_fifth_of_weighted_matching_where_all_are_praised():
    # The advantage is divided by its clip, 5, and on policy the surrogate has the gradient of A' m.
    experience = experience_for(AWM())
    praised = with_credit(experience, advantage=experience.credit.advantage.abs())
    awm = gradient(AWM(weighting="uniform"), praised)
    assert_same({k: 5 * v for k, v in awm.items()}, gradient(WeightedMatching(), praised))


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2", "huber", "ghuber"])
@pytest.mark.parametrize("kl", ["uniform", "elbo"])
def test_awm_forms_update_and_log_their_distances(weighting, kl):
    objective = AWM(weighting=weighting, kl_penalty=VelocityPenalty(weight=0.1, form=kl))
    algorithm = toy_algorithm(objective, sampler=FLOW)
    engine, learner = toy_engine(algorithm), toy_learner(algorithm)
    learner.learn(collect(engine, prompts=2, group_size=4).experience)
    metrics = learner.learn(collect(engine, update=1, prompts=2, group_size=4).experience)
    assert metrics["grad_norm"] > 0
    assert metrics["kl/reference"] > 0
    assert metrics["kl/old"] >= 0


def test_awm_elbo_distance_by_hand():
    # A velocity 0.1 away everywhere: (0.1)^2 / (2 s^2), s^2 = 0.49 sigma / (1 - sigma).
    objective = AWM(
        kl_penalty=VelocityPenalty(weight=1.0, form="elbo"),
        ema_kl_weight=0.0,
        sigmas=SigmaDraws(count=1, grid="rollout", steps=(3, 4)),
    )
    _, _, _, losses = evaluate(objective, moved=0.1)
    by_hand = 0.01 / (2 * 0.49 * 0.5 / 0.5)  # step 3 of 6 even ones is sigma = 1/2
    found = torch.cat([loss.metrics["kl/reference"] for loss in losses])
    torch.testing.assert_close(found, torch.full((8,), by_hand), rtol=1e-3, atol=0)


def test_awm_measures_ratios_against_the_old_policy():
    algorithm = toy_algorithm(AWM(ema_kl_weight=0.0), sampler=FLOW)
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    assert toy_learner(algorithm, optimizer_steps_per_iteration=2).learn(experience)["ratio/abs_minus_one_max"] > 0
    with pytest.raises(ValueError, match="optimizer_steps_per_iteration=1, or ema_kl_weight=0"):
        toy_learner(toy_algorithm(AWM(), sampler=FLOW), optimizer_steps_per_iteration=2).learn(experience)


def test_weighted_matching_leaves_out_the_blamed_but_counts_them():
    objective = WeightedMatching(sigmas=SigmaDraws(count=1))
    experience = experience_for(objective)
    # A next to nothing in place of the blame keeps those rollouts in the update without saying anything.
    advantage = experience.credit.advantage.clamp(min=1e-9)
    assert_same(gradient(objective, experience), gradient(objective, with_credit(experience, advantage=advantage)))


# --------------------------------------------------------------------------------------------------------- refusals


def test_groups_are_never_split():
    experience = experience_for(DGPO(), group_size=4)
    context = toy_learner(toy_algorithm(DGPO()), micro_batch_size=6)._context(8, 2, on_policy=True)
    kept = torch.ones(8, 2, dtype=torch.bool)
    kept[5, 1] = False
    batches = list(whole_groups(experience, kept, context, who="DGPO"))
    assert [len(rollouts) for rollouts, _ in batches] == [4, 4, 4, 3]
    assert all(len(experience.groups[rollouts].unique()) == 1 for rollouts, _ in batches)
    assert [draws.unique().tolist() for _, draws in batches] == [[0], [0], [1], [1]]


@pytest.mark.parametrize("objective", [DGPO(), CRD()], ids=["DGPO", "CRD"])
def test_a_group_that_does_not_fit_is_refused(objective):
    algorithm = toy_algorithm(objective, sampler=FLOW)
    experience = collect(toy_engine(algorithm), prompts=1, group_size=6).experience
    with pytest.raises(ValueError, match="Use micro_batch_size >= 6"):
        toy_learner(algorithm, micro_batch_size=5).learn(experience)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CRD(decay="soon"), "not a decay"),
        (lambda: CRD(temperature=0.0), "temperature"),
        (lambda: DGPO(clip_range=0.0), "clip_range"),
        (lambda: AWM(weighting="cubic"), "weighting"),
        (lambda: SigmaDraws(steps=(2, 2), grid="rollout"), "first < last"),
        (lambda: SigmaDraws(steps=(1, 3)), "bounded by low and high"),
    ],
)
def test_bad_values_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_draws_beyond_the_sampler_are_refused():
    algorithm = toy_algorithm(WeightedMatching(sigmas=SigmaDraws(count=2, grid="rollout", steps=(4, 9))), sampler=FLOW)
    with pytest.raises(ValueError, match="last <= 6"):
        toy_learner(algorithm).learn(collect(toy_engine(algorithm), prompts=1, group_size=4).experience)


def test_stratified_draws_take_one_step_of_each_range():
    # Steps 1..7 in three ranges: 1-2, 3-4, 5-6.
    draws = SigmaDraws(count=3, grid="stratified", steps=(1, 7))
    experience = experience_for(WeightedMatching(), group_size=6)
    trajectory = attrs.evolve(
        experience.trajectory,
        sigmas=torch.linspace(1, 0, 9), latents=torch.zeros(12, 9, 3, 8, 8), log_probs=torch.zeros(12, 8, 8, 8),
        stochastic=torch.zeros(8, dtype=torch.bool), noisy=torch.zeros(12, 8, dtype=torch.bool),
    )  # fmt: skip
    context = toy_learner(toy_algorithm(WeightedMatching()))._context(12, 2, on_policy=True)
    longer = attrs.evolve(experience, trajectory=trajectory)
    sigma, step = draws.draw(longer, experience.keys, context=context)
    assert all(1 + 2 * j <= int(s) <= 2 + 2 * j for row in step for j, s in enumerate(row))
    assert len(step.unique()) > 3
    torch.testing.assert_close(sigma, trajectory.sigmas[step])
    assert math.isclose(float(sigma.max()), float(trajectory.sigmas[int(step.min())]))
