"""On-policy distillation: by hand, routed, and as a run."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file

from rlt2i.objectives.distillation import OnPolicyDistillation
from tests.helpers.build import collect, gradients, toy_algorithm, toy_engine, toy_learner
from tests.helpers.objective_cases import FLOW, WINDOW, with_credit
from tests.helpers.toy import ToySpec


def teacher(folder: Path, name: str, shift: float) -> Path:
    """The fresh toy policy plus a constant image, as a file."""
    policy = ToySpec().load()
    with torch.no_grad():
        policy.image.add_(shift)
    policy.export(folder / name)
    return folder / name / "toy.safetensors"


def losses_of(objective: OnPolicyDistillation, sampler=FLOW, **credit: torch.Tensor):
    algorithm = toy_algorithm(objective, sampler=sampler)
    experience = collect(toy_engine(algorithm), prompts=3, group_size=1).experience
    experience = with_credit(experience, **credit) if credit else experience
    learner = toy_learner(algorithm)
    context = learner._context(experience.num_rollouts, 3, 1, on_policy=True)
    return learner, experience, list(objective.losses(algorithm.policy, experience, context=context))


def test_the_loss_by_hand(tmp_path: Path):
    # Everywhere v - v_teacher = -.2: squared .04; an advantage of 0 changes nothing, a mean-one weight neither.
    objective = OnPolicyDistillation(teachers={"only": teacher(tmp_path, "a", 0.2)})
    for credit in ({}, {"advantage": torch.zeros(3, 1, 1, 1)}, {"weight": torch.tensor([0.5, 1.5]).view(1, 1, 1, 2)}):
        _, _, losses = losses_of(objective, **credit)
        assert sum(float(loss.value.detach()) for loss in losses) == pytest.approx(0.04, rel=1e-4)


def test_the_exact_form_is_the_divergence_of_the_steps(tmp_path: Path):
    # The mean moves by (1 + s^2 (1 - sigma) / (2 sigma)) dt times .2; Flow-SDE's own numbers give the rest.
    objective = OnPolicyDistillation(teachers={"only": teacher(tmp_path, "a", 0.2)}, form="exact")
    _, experience, losses = losses_of(objective, sampler=WINDOW)
    trajectory, zero = experience.trajectory, torch.zeros(1, 1, 1, 1)
    expected = 0.0
    for t in range(3):
        now, then = trajectory.sigmas[t : t + 1], trajectory.sigmas[t + 1 : t + 2]
        moved = trajectory.transition(zero, zero + 0.2, now, then)
        expected += float(moved.mean**2 / (2 * moved.std**2)) / 3
    assert sum(float(loss.value.detach()) for loss in losses) == pytest.approx(expected, rel=1e-3)


def test_every_prompt_has_its_teacher(tmp_path: Path):
    # Prompts 0 and 2 go to a (shift .1), prompt 1 to the rest (shift .3): (.01 + .09 + .01) / 3.
    paths = {"a": teacher(tmp_path, "a", 0.1), "other": teacher(tmp_path, "b", 0.3)}
    objective = OnPolicyDistillation(teachers=paths, route="kind")
    algorithm = toy_algorithm(objective, sampler=FLOW)
    experience = collect(toy_engine(algorithm), prompts=3, group_size=1).experience
    kinds = ({"kind": "a"}, {"kind": "b"}, {"kind": "a"})
    experience = attrs.evolve(experience, prompts=attrs.evolve(experience.prompts, metadata=kinds))
    context = toy_learner(algorithm)._context(3, 3, 1, on_policy=True)
    losses = list(objective.losses(algorithm.policy, experience, context=context))
    assert sum(float(loss.value.detach()) for loss in losses) == pytest.approx(0.11 / 3, rel=1e-4)
    assert {name for loss in losses for name in loss.metrics} == {"loss/distillation", "distance/a", "distance/other"}
    lonely = OnPolicyDistillation(teachers={"a": paths["a"], "c": paths["a"]}, route="kind")
    with pytest.raises(ValueError, match=r"has 'b' there, and the teachers are.*Name a teacher 'b', or one called"):
        list(lonely.losses(algorithm.policy, experience, context=context))


def test_the_student_becomes_its_teacher(tmp_path: Path):
    path = teacher(tmp_path, "a", 0.5)
    algorithm = toy_algorithm(OnPolicyDistillation(teachers={"only": path}), sampler=FLOW)
    learner, engine = toy_learner(algorithm, learning_rate=0.05), toy_engine(algorithm)
    distances = [
        learner.learn(collect(engine, update=i, group_size=2).experience)["loss/distillation"] for i in range(30)
    ]
    assert distances[-1] < 0.05 * distances[0]
    assert learner.saved_sets == ()  # the teacher is a file already


def test_where_no_gradient_is_due_there_is_none(tmp_path: Path):
    objective = OnPolicyDistillation(teachers={"only": teacher(tmp_path, "same", 0.0)})
    algorithm = toy_algorithm(objective, sampler=FLOW)
    found = gradients(toy_learner(algorithm), collect(toy_engine(algorithm), prompts=2, group_size=2).experience)
    assert all(value.abs().max() == 0 for value in found.values())


def test_what_cannot_teach_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="nobody teaches"):
        OnPolicyDistillation(teachers={})
    with pytest.raises(ValueError, match="2 teachers and no route"):
        OnPolicyDistillation(teachers={"a": tmp_path, "b": tmp_path})
    empty = OnPolicyDistillation(teachers={"a": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match=r"no teacher at .*nowhere. Train it first"):
        toy_learner(toy_algorithm(empty, sampler=FLOW))
    path = teacher(tmp_path, "a", 0.1)
    other = {f"x.{k}": v for k, v in load_file(path).items()}
    learner = toy_learner(toy_algorithm(OnPolicyDistillation(teachers={"a": path}), sampler=FLOW))
    with pytest.raises(ValueError, match=r"teacher-a.*belong to another policy or adapter"):
        learner.sets.load("teacher-a", other)
