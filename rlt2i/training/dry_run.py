"""What can be known of a run without its weights: do the parts fit, the batches work out, the memory do?"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import attrs

from rlt2i.captures import NEGATIVE
from rlt2i.policies.cost import NotCounted, Plan, make_plan
from rlt2i.policies.pretrained import PretrainedSpec
from rlt2i.recipes.recipe import Recipe
from rlt2i.recipes.train_config import BatchPlan, Sharding, derive_batch
from rlt2i.samplers.chunked import chunk_size
from rlt2i.samplers.rollout import CLEAN_PREDICTIONS
from rlt2i.tasks.base import check_metadata
from rlt2i.training.sharding import check_sharding
from rlt2i.types import height_and_width


def batch_plan(recipe: Recipe, *, world_size: int) -> BatchPlan:
    """The batch arithmetic of a recipe.

    Raises:
        ValueError: when whole groups cannot be shared evenly among the processes, or one must fit into a forward
            pass and does not.
    """
    num_steps, train = recipe.sampler.num_steps, recipe.train
    images = chunk_size(recipe.sampler, train.group_size, train.rollout_batch_size)
    train = attrs.evolve(train, rollout_batch_size=images)
    draws: Any = getattr(recipe.objective, "sigmas", None)
    trained = recipe.objective.trained_steps(recipe.sampler) if draws is None else draws.count
    return derive_batch(train, world_size=world_size, num_steps=num_steps, trained_steps=trained)


def check_sizes(recipe: Recipe) -> None:
    """Refuse, before anything is loaded, sizes that the task's images or the policy's network cannot have.

    Raises:
        ValueError: with a size that works.
    """
    for size in (recipe.train.image_size, *recipe.train.sizes):
        recipe.task.check_image_size(size)
        recipe.policy.check_image_size(size)


def describe_run(recipe: Recipe, *, world_size: int = 1) -> str:
    """What `rlt2i train --dry-run` prints.

    Raises:
        ValueError: when the parts do not fit, or the batches do not work out.
    """
    batches = describe_batches(recipe, world_size=world_size)
    try:
        size = f"per process:\n{plan_of(recipe, batch_plan(recipe, world_size=world_size)).table()}"
    except (NotCounted, OSError) as error:  # OSError: the configurations are out of reach
        size = f"per process: not counted. {error}"
    return f"{batches}\n\n{size}"


def describe_batches(recipe: Recipe, *, world_size: int = 1) -> str:
    """The part of it that needs no counting: what the recipe is, and its batches.

    Raises:
        ValueError: when the parts do not fit, or the batches do not work out.
    """
    recipe.algorithm().check_group_size(recipe.train.group_size)
    check_metadata(recipe.task, recipe.sampler, recipe.reward, *recipe.heldout.values())
    check_sizes(recipe)
    check_sharding(recipe, world_size=None)
    batch = batch_plan(recipe, world_size=world_size)
    heading = f"{recipe.name}  {recipe.hash[:8]}  evidence: {recipe.evidence}"
    return "\n".join([heading, recipe.about, "", batch.table()])


def plan_of(recipe: Recipe, batch: BatchPlan) -> Plan:
    """Parameters, arithmetic and memory of one process.

    Raises:
        NotCounted: when the policy is no pipeline of diffusers, or its network cannot run without values.
        OSError: when the configurations of its networks are out of reach.
    """
    if not isinstance(recipe.policy, PretrainedSpec):
        raise NotCounted(f"{type(recipe.policy).__name__} is no pipeline of diffusers")
    train, objective = recipe.train, recipe.objective
    captures = recipe.algorithm().captures
    copies = objective.needs.parameter_sets | ({"reference"} if train.reference else set())
    return make_plan(
        recipe.policy,
        image_size=max((train.image_size, *train.sizes), key=lambda size: math.prod(height_and_width(size))),
        num_steps=batch.num_steps,
        trained_steps=batch.trained_steps,
        rollouts_per_iteration=batch.rollouts_per_device,
        micro_batch_size=batch.micro_batch_size,
        rollout_batch_size=batch.rollout_batch_size,
        weight_copies=len(copies) + (train.ema_decay is not None),
        optimizer_steps=batch.optimizer_steps,
        noisy_steps=len(recipe.sampler.stochastic_steps(0)),
        clean_predictions=batch.num_steps if CLEAN_PREDICTIONS in captures else 0,
        negatives=batch.num_steps if NEGATIVE in captures else 0,
        parts=parts_of(train.sharding, world_size=batch.world_size),
        judges=judges_of(recipe),
        reward_gradient="gradient" in objective.needs.reward,
    )


def parts_of(sharding: Sharding, *, world_size: int) -> int:
    """How many processes share what learns; with copies across machines, those of a machine."""
    if sharding == "none":
        return 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 8))
    return world_size if sharding == "full" else min(here, world_size)


def judges_of(recipe: Recipe) -> dict[str, int | None]:
    """Networks that rewards, held-out ones too, and credit keep beside the policy -> bytes, None where not known."""
    networks_by_name: dict[str, int | None] = {}
    for part in (recipe.reward, *recipe.heldout.values(), *_parts(recipe.credit)):
        if networks := getattr(part, "networks", None):
            networks_by_name |= networks()
    return networks_by_name


def _parts(part: Any) -> Iterator[Any]:
    """A part, and the parts in its fields, at any depth."""
    if isinstance(part, tuple | list):
        for item in part:
            yield from _parts(item)
    elif attrs.has(type(part)):
        yield part
        for field in attrs.fields(type(part)):
            yield from _parts(getattr(part, field.name))
