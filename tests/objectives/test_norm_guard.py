"""NormGuard: the hinge by hand, and that it leaves the wrapped objective as it is."""

from __future__ import annotations

import pytest
import torch

from rlt2i.functional.norms import norm_excess
from rlt2i.interfaces import Objective
from rlt2i.objectives.norm_guard import NormGuard
from tests.helpers.build import collect, toy_algorithm, toy_engine, toy_learner
from tests.helpers.objective_cases import ALL, assert_same, experience_for, gradient, sampler_for


def test_norm_excess_by_hand():
    # Two coordinates: (3, 4) has the root mean square 5 / sqrt 2, (1, 1) has 1. Shorter or equal: nothing.
    v = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.5, 0.0]], dtype=torch.float64).view(3, 2, 1, 1).requires_grad_()
    reference = torch.ones(3, 2, 1, 1, dtype=torch.float64)
    found = norm_excess(v, reference)
    torch.testing.assert_close(found, torch.tensor([5 / 2**0.5 - 1, 0.0, 0.0], dtype=torch.float64))
    (slope,) = torch.autograd.grad(found.sum(), v)
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(slope.view(3, 2), expected)


@pytest.mark.parametrize("name", ALL)
def test_at_the_reference_it_is_the_wrapped_objective(name: str):
    experience = experience_for(ALL[name])
    assert_same(gradient(NormGuard(objective=ALL[name]), experience), gradient(ALL[name], experience), exactly=True)


def longer(objective: Objective, *, sequences: int) -> float:
    """What the hinge adds to the loss where every velocity is the reference's and .5 more in each coordinate."""
    algorithm = toy_algorithm(objective, sampler=sampler_for(objective))
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    guarded = NormGuard(objective=objective, weight=2.0)
    learner = toy_learner(toy_algorithm(guarded, sampler=sampler_for(objective)), micro_batch_size=sequences)
    learner.sets.add("old") if "old" not in learner.sets.names else None
    with torch.no_grad():
        learner.policy.image.add_(50.0)  # so long that it is longer everywhere, by nearly the same
    context = learner._context(experience.num_rollouts, 2, 3 * experience.num_rollouts, on_policy=False)
    plain = sum(float(x.value.detach()) for x in objective.losses(learner.policy, experience, context=context))
    found = list(guarded.losses(learner.policy, experience, context=context))
    excess = torch.cat([loss.metrics["norm/excess"].flatten() for loss in found])
    assert (excess > 40).all()
    return (sum(float(x.value.detach()) for x in found) - plain) / float(excess.mean())


@pytest.mark.parametrize("name", ["clipped", "nft", "dgpo", "dpo"])
def test_the_hinge_is_a_mean_whatever_the_micro_batches(name: str):
    # weight 2 x the mean over all states: neither the number of micro-batches nor that of draws matters.
    for sequences in (5, 1000):
        assert longer(ALL[name], sequences=sequences) == pytest.approx(2.0, rel=0.02)
