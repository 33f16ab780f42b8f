"""Nothing of an iteration mixes devices or makes the host wait, shown on a device that only pretends to be one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from rlt2i.algorithm import Algorithm
from rlt2i.distributed import Distributed
from rlt2i.engine import Collected
from rlt2i.learner import Averages
from rlt2i.policies.guidance import Guided, IntervalGuidance
from rlt2i.recipes import list_recipes, load_recipe
from rlt2i.recipes.recipe import Recipe
from rlt2i.rehearsal.replacing import make_small
from rlt2i.samplers.sde import SDE
from rlt2i.seeds import RolloutNoise, derive_seed
from rlt2i.tasks.base import as_prompts
from rlt2i.training.start import assemble
from rlt2i.training.trainer import Trainer
from rlt2i.types import Prompts
from tests.helpers.pretend_device import DEVICE, MixedDevicesError, Watch, pretend_device, send

ALWAYS = ("star-sd35-ocr", "nft-sd35-geneval")
"""The reverse process with maps, and the forward process; the other recipes are slow tests."""


def test_tensors_of_two_devices_do_not_mix():
    with pretend_device():
        there = torch.ones(3).to(DEVICE)
        assert (there * 2.0 + 1).device == DEVICE
        with pytest.raises(MixedDevicesError, match=r"aten::add.*\[3\] of the host"):
            there + torch.ones(3)


@pytest.mark.parametrize(
    ("reads", "kind"),
    [
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x[x > 0], "boolean index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: x[torch.tensor([0])], "index on the host"),
        (lambda x: x + torch.tensor([1.0, 2.0], device=DEVICE), "copy to the device"),
    ],
)
def test_what_the_host_waits_for_is_counted(reads, kind):
    with pretend_device() as watch:
        there = torch.tensor([1.0, 2.0]).to(DEVICE, non_blocking=True)
        assert watch.total == 0
        reads(there)
    assert [where.partition(" at ")[0] for where in watch.waits] == [kind]


def test_numbers_computed_on_the_device_are_those_of_the_host():
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with pretend_device():
        there = weights.detach().to(DEVICE).requires_grad_()
        (there @ there).tanh().sum().backward()
        gradient = there.grad.cpu()
    (weights @ weights).tanh().sum().backward()
    assert torch.equal(gradient, weights.grad)


# ------------------------------------------------------------------------------------------------------------ recipes


def trainer_on_device(recipe: Recipe, algorithm: Algorithm, folder: Path) -> Trainer:
    """With an algorithm that was loaded on the host."""
    algorithm = attrs.evolve(algorithm, policy=send(algorithm.policy))
    return assemble(recipe, algorithm, folder, None, Distributed.alone(DEVICE), print, None)


def prompts_of(recipe: Recipe) -> Prompts:
    stream = recipe.task.train_prompts(seed=0, start=0, count=recipe.train.prompts_per_iteration)
    return as_prompts(stream, group_size=recipe.train.group_size)


@pytest.fixture(scope="module", params=ALWAYS)
def small(request, tmp_path_factory) -> tuple[Recipe, Algorithm, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    recipe = make_small(load_recipe(request.param), folder, compile_blocks=False).recipe
    return recipe, recipe.algorithm().load("cpu"), folder


@pytest.fixture
def ready(small) -> Iterator[tuple[Trainer, Prompts, Watch]]:
    recipe, algorithm, folder = small
    with pretend_device() as watch:
        trainer = trainer_on_device(recipe, algorithm, folder)
        prompts = prompts_of(recipe)
        trainer.policy.encode(prompts)
        watch.waits.clear()
        yield trainer, prompts, watch


def collect(ready, *, steps: int, chunk: int) -> Collected:
    """With a schedule of few steps."""
    trainer, prompts, watch = ready
    sampler = trainer.engine.algorithm.sampler
    sampler = attrs.evolve(sampler, num_steps=steps, **({"window": None} if isinstance(sampler, SDE) else {}))
    algorithm = attrs.evolve(trainer.engine.algorithm, sampler=sampler)
    engine = attrs.evolve(trainer.engine, algorithm=algorithm, rollout_batch_size=chunk)
    watch.waits.clear()
    with trainer.learner.sets.use(trainer.learner.objective.rollout_weights):
        return engine.collect(prompts, iteration=0)


def waits_of_collecting(ready, *, steps: int, chunk: int) -> int:
    collect(ready, steps=steps, chunk=chunk)
    return ready[2].total


def test_collecting_waits_for_no_step_and_at_most_twice_for_a_chunk(ready):
    _, prompts, watch = ready
    few = waits_of_collecting(ready, steps=2, chunk=prompts.num_rollouts)
    assert waits_of_collecting(ready, steps=4, chunk=prompts.num_rollouts) == few, watch.table()
    halves = waits_of_collecting(ready, steps=2, chunk=prompts.num_rollouts // 2)
    assert halves - few <= 2, watch.table()


def test_guidance_at_some_levels_waits_for_no_step(ready):
    trainer, prompts, watch = ready
    if not isinstance(trainer.policy, Guided):
        pytest.skip("the forward-process recipe is unguided")
    form = IntervalGuidance(low=0.5)
    algorithm = attrs.evolve(trainer.engine.algorithm, policy=attrs.evolve(trainer.policy, form=form))
    trainer.engine = attrs.evolve(trainer.engine, algorithm=algorithm)
    few = waits_of_collecting(ready, steps=2, chunk=prompts.num_rollouts)
    assert waits_of_collecting(ready, steps=4, chunk=prompts.num_rollouts) == few, watch.table()


def test_learning_waits_for_no_micro_batch_and_at_most_eight_times_for_a_step(ready):
    trainer, prompts, watch = ready
    steps = trainer.engine.algorithm.sampler.num_steps  # an objective may name steps of this schedule
    experience = collect(ready, steps=steps, chunk=prompts.num_rollouts).experience
    waits, batches = [], []
    few = 4 if isinstance(trainer.engine.algorithm.sampler, SDE) else 2  # fewer pairs on the forward process
    for size in (64, few):
        passes: list[int] = []
        trainer.learner.micro_batch_size = size
        watch.waits.clear()
        trainer.learner.learn(experience, passes.append)
        waits.append(watch.total)
        batches.append(len(passes))
    assert batches[1] > batches[0]
    assert waits[1] == waits[0], watch.table()
    assert waits[0] <= 8 * trainer.learner.optimizer_steps_per_iteration, watch.table()


@pytest.mark.slow(days=64)
@pytest.mark.parametrize("name", [entry.name for entry in list_recipes() if entry.name not in ALWAYS])
def test_one_iteration_of_a_shipped_recipe(name: str, tmp_path: Path):
    recipe = make_small(load_recipe(name), tmp_path, compile_blocks=False).recipe
    algorithm = recipe.algorithm().load("cpu")
    with pretend_device() as watch:
        trainer = trainer_on_device(recipe, algorithm, tmp_path)
        prompts = prompts_of(recipe)
        trainer.policy.encode(prompts)
        watch.waits.clear()
        with trainer.learner.sets.use(trainer.learner.objective.rollout_weights):
            experience = trainer.engine.collect(prompts, iteration=0).experience
        steps = [where for where in watch.waits if "rlt2i/samplers/" in where or "rlt2i/policies/" in where]
        assert not steps, "\n".join(steps)
        passes: list[int] = []
        watch.waits.clear()
        with counted_passes(algorithm.policy) as forward:
            trainer.learner.learn(experience, passes.append)
        ours = sum(count for where, count in watch.waits.items() if " at rlt2i/" in where)
        assert ours <= 2 * len(passes) + 8 * recipe.train.optimizer_steps_per_iteration, watch.table()
        # A network of diffusers may read the lengths of its texts once a pass (Lumina 2 does).
        assert watch.total - ours <= len(forward), watch.table()


@contextlib.contextmanager
def counted_passes(policy: Any) -> Iterator[list[int]]:
    """Grows by one with every pass of the network."""
    passes: list[int] = []
    network = getattr(policy, "policy", policy).network
    hook = network.register_forward_pre_hook(lambda *_: passes.append(1))
    yield passes
    hook.remove()


# ----------------------------------------------------------------------------------------------------- what it rests on


def test_noise_drawn_ahead_is_the_noise_drawn_when_asked_for():
    seeds = [derive_seed("steps", i) for i in range(3)]
    ahead, asked = RolloutNoise(seeds, seeds), RolloutNoise(seeds, seeds)
    ahead.draw_ahead((4, 2, 2), count=2)
    for _ in range(3):  # the third is beyond what was announced
        assert torch.equal(ahead.step((4, 2, 2)), asked.step((4, 2, 2)))
    assert torch.equal(ahead.step((4, 2, 2), torch.tensor([1, 1, -1])), asked.step((4, 2, 2))[[1, 1, 2]])


def test_averages_by_hand():
    seen = Averages()
    seen.add({"a": torch.tensor([1.0, 2.0]), "clip/high": torch.tensor([0.0, 1.0])}, torch.tensor([3, 5]))
    seen.add({"a": torch.tensor([6.0]), "clip/high": torch.tensor([1.0]), "b_max": torch.tensor([-2.0, -4.0])},
             torch.tensor([5]))  # fmt: skip
    assert seen.result() == {"a": 3.0, "clip/high": 2 / 3, "clip/high@3": 0.0, "clip/high@5": 1.0, "b_max": 0.0}
