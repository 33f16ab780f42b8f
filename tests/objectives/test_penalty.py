"""What holds a policy near its reference: by hand, and as recipes write it."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.config import ConfigError, load_object
from rlt2i.interfaces import Objective
from rlt2i.objectives.awm import AWM
from rlt2i.objectives.penalty import KLPenalty, VelocityPenalty
from rlt2i.recipes.parts import PARTS
from rlt2i.recipes.recipe import build_part, load_recipe
from tests.helpers.objective_cases import experience_for

HELD = sorted(
    name
    for name, reference in PARTS["Objective"].items()
    if "kl_penalty" in attrs.fields_dict(load_object(reference))  # type: ignore[arg-type]
)


FREE = {"DiffusionDPO", "OnlineDPO", "DiffusionOPSD", "OnPolicyDistillation", "ReinforceAdjointMatching", "NormGuard"}
"""Published without a penalty: an anchor is within their loss, or (NormGuard) within the objective that they wrap."""


def test_all_other_objectives_share_it():
    assert set(PARTS["Objective"]) - set(HELD) == FREE
    for name in HELD:
        free = build_part(Objective, {"type": name})
        held = build_part(Objective, {"type": name, "kl_penalty": {"weight": 0.1}})
        assert "reference" in held.needs.parameter_sets
        assert "reference" not in free.needs.parameter_sets or name == "DGPO"  # whose anchor it is


@pytest.mark.parametrize(
    ("where", "distance"),
    [("uniform", 2.0), ("credit", 3.0), ("inverse", 1.0)],  # (4 + 0) / 2, (1.5 * 4 + .5 * 0) / 2, (.5 * 4) / 2
)
def test_a_penalty_acts_where_it_is_told_to(where, distance: float):
    experience = experience_for(AWM())
    states = experience.step_batch(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    states = attrs.evolve(states, weight=torch.tensor([[[1.5, 0.5]]]))
    velocity, reference = torch.tensor([[[[3.0, 1.0]]]]), torch.ones(1, 1, 1, 2)  # squared: 4 and 0
    penalty = VelocityPenalty(weight=0.5, where=where)
    found = penalty.distance(velocity, reference, states, torch.tensor([0.5]))
    assert found.tolist() == [distance]
    assert KLPenalty(where=where).mean(torch.tensor([[[4.0, 0.0]]]), states).tolist() == [distance]
    loss, logged = penalty.plus(torch.tensor([1.0]), found, scale=torch.tensor([0.5]))
    assert loss.tolist() == [1 + 0.5 * 0.5 * distance]
    assert logged["kl/reference"].tolist() == [distance]


@pytest.mark.parametrize("name", HELD)
def test_a_flat_key_is_refused_with_its_new_name(name: str):
    with pytest.raises(ConfigError, match=r"kl_weight: \w+ has no such field: it is called 'kl_penalty.weight' now"):
        build_part(Objective, {"type": name, "kl_weight": 0.1})


@pytest.mark.parametrize(
    ("override", "new"),
    [
        ("objective.kl_weight=0.1", "objective.kl_penalty.weight"),
        ("objective.kl=exact", "objective.kl_penalty.form"),
        ("kl_map=credit", "objective.kl_penalty.where"),
        ("train.updates=3", "train.iterations"),
        ("warmup_updates=3", "train.warmup_steps"),
        ("credit.entropy_power=1", "credit.allocations.0.doubt"),
    ],
)
def test_an_override_of_a_former_name_says_todays(override: str, new: str):
    with pytest.raises(ConfigError, match=f"--set {override}: this field is called {new} now"):
        load_recipe("star-shapes", [override])


def test_a_former_name_of_another_section_is_not_offered():
    with pytest.raises(ConfigError, match="there is no such field"):
        load_recipe("star-shapes", ["credit.updates=3"])
