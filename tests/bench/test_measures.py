"""Measures that follow from recorded ones, and nats of a sampling path: by hand, then on the toy policy."""

from __future__ import annotations

import math

import pytest
import torch

from rlt2i.bench.derived import MEANINGS, measures
from rlt2i.bench.divergence import inside_and_outside, path_divergence
from rlt2i.interfaces import Policy
from rlt2i.parameter_sets import ParameterSets
from tests.helpers.toy_recipe import clipped

TRIAL = ("star", 0)


def test_hacking_gaps_by_hand():
    held_out = {
        "reward": {TRIAL: {0: 0.5, 2: 0.6, 4: 0.8}},
        "strict": {TRIAL: {0: 0.4, 2: 0.5, 4: 0.6}},
        "heldout/judge": {TRIAL: {0: 3.0, 2: 3.1, 4: 3.1}},
    }
    # In training .9 was scored by the weights after iteration 3, which had .7 on held-out prompts.
    training = {"reward/mean": {TRIAL: {1: 0.5, 2: 0.6, 3: 0.8, 4: 0.9}}}
    found = {k: v[TRIAL] for k, v in measures(held_out, training, metric="strict", last=4).items()}
    assert found == {
        "gap/unseen prompts": {4: pytest.approx(0.4 - 0.2)},
        "gap/strict": {4: pytest.approx(0.3 - 0.2)},
        "gap/judge": {4: pytest.approx(0.3 - 0.1)},
    }
    assert all(name.startswith(tuple(MEANINGS)) for name in found)


def test_gains_over_what_they_cost_by_hand():
    held_out = {"strict": {TRIAL: {0: 0.4, 4: 0.6}}, "kl/path": {TRIAL: {4: 8.0}}}
    training = {"kl/base": {TRIAL: {3: 0.01, 4: 0.05}}}
    found = {k: v[TRIAL][4] for k, v in measures(held_out, training, metric="strict", last=4).items()}
    assert found == pytest.approx({"gain per nat": 0.2 / 8, "gain per drift": 0.2 / 0.05})
    # What was not recorded, and what did not move, has none.
    assert measures({"strict": held_out["strict"]}, {}, metric="strict", last=4) == {}
    still = held_out | {"kl/path": {TRIAL: {4: 0.0}}}
    assert "gain per nat" not in measures(still, {}, metric="strict", last=4)


def test_nats_inside_and_outside_by_hand():
    nats = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    inside = torch.zeros(1, 4, 4)
    inside[:, :2, :2] = 1
    found = inside_and_outside(nats, inside)
    assert found == {"kl/path": 10.0, "kl/inside": 1.0, "kl/outside": 9.0}
    assert inside_and_outside(nats, None) == {"kl/path": 10.0}


def test_path_divergence_is_zero_at_the_base_and_that_of_gaussians_beside_it():
    recipe = clipped()
    policy = recipe.algorithm().load().policy
    assert isinstance(policy, Policy)
    sets = ParameterSets(policy.trainable_parameters())
    sets.add("reference")

    def nats() -> torch.Tensor:
        return path_divergence(
            policy, sets, recipe.task.eval_prompts(3), num_steps=4, seed=0, image_size=8, rollout_batch_size=2
        )

    at_base = nats()
    assert at_base.shape[0] == 3
    assert float(at_base.abs().max()) == 0
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.01)
    near = nats()
    assert float(near.min()) >= 0
    assert float(near.sum()) > 0
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.01)
    # Gaussians of one width: twice as far is about four times the divergence, and a path does not depend on chunks.
    assert 2 < float(nats().sum() / near.sum()) < 8
    assert math.isfinite(float(near.sum()))
