"""Rollouts without advantage are learned from where the published loss gives them a gradient."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.interfaces import Objective
from rlt2i.learner import Learner
from rlt2i.objectives.awm import AWM
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.crd import CRD
from rlt2i.objectives.dgpo import DGPO
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.penalty import KLPenalty, VelocityPenalty
from rlt2i.objectives.sft import WeightedMatching
from rlt2i.types import Experience
from tests.helpers.build import gradients, toy_algorithm, toy_learner
from tests.helpers.objective_cases import experience_for, sampler_for, with_credit

PULL = VelocityPenalty(weight=0.5)
PULLING: dict[str, Objective] = {
    "nft": DiffusionNFT(),
    "nft+kl": DiffusionNFT(kl_penalty=PULL),
    "awm": AWM(),
    "awm+kl": AWM(ema_kl_weight=0.0, kl_penalty=PULL),
    "crd": CRD(),
    "dgpo+kl": DGPO(kl_penalty=PULL),
    "sft+kl": WeightedMatching(kl_penalty=PULL),
}
SILENT: dict[str, Objective] = {"awm": AWM(ema_kl_weight=0.0), "dgpo": DGPO(), "sft": WeightedMatching()}


def apart(objective: Objective) -> Learner:
    """A learner whose policy has left its old and its reference weights behind, everywhere alike."""
    algorithm = toy_algorithm(objective, sampler=sampler_for(objective))
    learner = toy_learner(algorithm)
    with torch.no_grad():
        for index, parameter in enumerate(algorithm.policy.trainable_parameters().values()):
            parameter.add_(0.1 * (1 + index))
    return learner


def half_tied(objective: Objective) -> Experience:
    experience = experience_for(objective, prompts=4, group_size=3)
    advantage = experience.credit.advantage.clone()
    advantage[: len(advantage) // 2] = 0
    return with_credit(experience, advantage=advantage)


def of_all_rows(objective: Objective, experience: Experience) -> dict[str, torch.Tensor]:
    """The gradient of the loss as published: a sum over every rollout, with nothing dropped."""
    learner = apart(objective)
    count, groups = experience.num_rollouts, len(experience.groups.unique())
    context = learner._context(count, groups, count * experience.trajectory.num_steps, on_policy=True)
    for loss in objective.losses(learner.policy, experience, context=context):
        loss.value.backward()
    return {name: p.grad.clone() for name, p in learner.policy.trainable_parameters().items()}


def check_nothing_is_missing(objective: Objective, experience: Experience) -> dict[str, torch.Tensor]:
    """The learner's gradient is that of all rows, which is returned."""
    expected, learned = of_all_rows(objective, experience), gradients(apart(objective), experience)
    for key, gradient in expected.items():
        torch.testing.assert_close(learned[key], gradient, rtol=1e-4, atol=1e-6)
    return expected


@pytest.mark.parametrize("name", PULLING)
def test_the_learner_drops_no_rollout_that_pulls(name: str):
    objective = PULLING[name]
    experience = half_tied(objective)
    expected = check_nothing_is_missing(objective, experience)
    # And it would have mattered: with the tied rollouts gone the gradient is another one.
    half = torch.arange(experience.num_rollouts // 2, experience.num_rollouts)
    dropped = attrs.evolve(experience.rewards, valid=torch.isin(torch.arange(experience.num_rollouts), half))
    without = gradients(apart(objective), attrs.evolve(experience, rewards=dropped))
    error = max(float((without[key] / 2 - g).norm() / g.norm()) for key, g in expected.items() if g.norm() > 0)
    assert error > 0.02


@pytest.mark.parametrize("name", SILENT)
def test_where_nothing_pulls_the_dropped_rollouts_change_nothing(name: str):
    check_nothing_is_missing(SILENT[name], half_tied(SILENT[name]))


def test_an_invalid_rollout_is_left_out_whoever_pulls():
    objective = PULLING["nft"]
    experience = half_tied(objective)
    valid = experience.rewards.valid.clone()
    valid[0] = False
    one_less = attrs.evolve(experience, rewards=attrs.evolve(experience.rewards, valid=valid))
    taken = experience.take(torch.arange(1, experience.num_rollouts))
    for key, gradient in gradients(apart(objective), taken).items():
        torch.testing.assert_close(gradients(apart(objective), one_less)[key], gradient, rtol=1e-5, atol=1e-7)


def test_the_clipped_surrogate_trains_on_what_has_an_advantage_as_its_authors_do():
    assert ClippedSurrogate(kl_penalty=KLPenalty(weight=0.1)).needs.rows == "advantage"
