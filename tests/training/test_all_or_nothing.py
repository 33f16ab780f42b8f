"""A batch is learned from as a whole or not at all, whichever of its optimizer steps is refused."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.learner import Learner, UpdateRefused
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.types import Experience
from tests.helpers.build import toy_algorithm, toy_learner
from tests.helpers.objective_cases import experience_for, sampler_for


def everything(learner: Learner) -> dict[str, torch.Tensor]:
    state = {f"policy/{k}": p.detach().clone() for k, p in learner.policy.trainable_parameters().items()}
    state |= {k: v.clone() for k, v in learner.sets.state().items()}
    for index, entries in enumerate(learner.optimizer.state.values()):
        state |= {f"optimizer/{index}/{k}": torch.as_tensor(v).clone() for k, v in entries.items()}
    rates = [group["lr"] for group in learner.optimizer.param_groups]
    return state | {"steps": torch.tensor(learner.optimizer_step), "lr": torch.tensor(rates)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def broken_at(experience: Experience, step: int) -> Experience:
    """The same batch, in which the share of optimizer step `step` of 4 meets a NaN."""
    groups = experience.groups.unique()
    latents = experience.trajectory.latents.clone()
    latents[experience.groups == groups.chunk(4)[step][0]] = float("nan")
    return attrs.evolve(experience, trajectory=attrs.evolve(experience.trajectory, latents=latents))


def learner_of(objective) -> Learner:
    learner = toy_learner(toy_algorithm(objective, sampler=sampler_for(objective)), optimizer_steps_per_iteration=4)
    return attrs.evolve(learner, ema_decay=0.9, warmup_steps=10)


@pytest.mark.parametrize("objective", [ClippedSurrogate(), DiffusionNFT()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize(("step", "started"), [(0, True), (1, False), (2, True), (3, False), (3, True)])
def test_a_nan_at_any_step_leaves_the_state_before_the_batch(objective, step, started):
    experience = experience_for(objective, prompts=4, group_size=3)
    learner, twin = learner_of(objective), learner_of(objective)
    if started:
        learner.learn(experience)
        twin.learn(experience)
    before = everything(learner)
    with pytest.raises(UpdateRefused, match="not applied"):
        learner.learn(broken_at(experience, step))
    assert_equal(everything(learner), before)
    # And it goes on from there exactly as one that never met the broken batch.
    learner.learn(experience)
    twin.learn(experience)
    assert_equal(everything(learner), everything(twin))


def test_any_other_failure_of_a_later_step_is_rolled_back_too():
    learner = learner_of(ClippedSurrogate())
    experience = experience_for(ClippedSurrogate(), prompts=4, group_size=3)
    before, calls = everything(learner), []
    step = learner.optimizer.step

    def third_time_fails() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("out of memory")
        step()

    learner.optimizer.step = third_time_fails
    with pytest.raises(MemoryError):
        learner.learn(experience)
    assert_equal(everything(learner), before)
