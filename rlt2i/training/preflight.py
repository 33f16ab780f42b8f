"""Everything that can be known before any weight is read is checked before any weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rlt2i.config.secrets import refuse_secrets
from rlt2i.recipes.recipe import Recipe
from rlt2i.recipes.train_config import BatchPlan
from rlt2i.runs.trackers import check_trackers
from rlt2i.tasks.base import TaskPrompt, check_metadata
from rlt2i.training.dry_run import batch_plan, check_sizes
from rlt2i.training.sharding import check_sharding


def check_before_weights(recipe: Recipe, *, world_size: int) -> BatchPlan:
    """The batch arithmetic of a recipe whose parts fit, whose prompts can be read and whose trackers are there.

    Raises:
        ValueError: with the reason and the way out.
    """
    train = recipe.train
    refuse_secrets(recipe.mapping())
    recipe.algorithm().check_group_size(train.group_size)
    check_metadata(recipe.task, recipe.sampler, recipe.reward, *recipe.heldout.values())
    check_sizes(recipe)
    check_sharding(recipe, world_size=world_size)
    check_trackers(train.trackers)
    batch = batch_plan(recipe, world_size=world_size)
    first = recipe.task.train_prompts(seed=train.seed, start=0, count=train.prompts_per_iteration)
    _check_prompts(recipe, first, "training")
    if train.eval_prompts:
        _check_prompts(recipe, recipe.task.eval_prompts(train.eval_prompts), "held-out")
    return batch


def _check_prompts(recipe: Recipe, prompts: Sequence[TaskPrompt], which: str) -> None:
    if not prompts:
        raise ValueError(f"{type(recipe.task).__name__}: there are no {which} prompts. Give the task some.")
    for name, reward in {"": recipe.reward, **recipe.heldout}.items():
        for prompt in prompts:
            if missing := sorted(reward.metadata_keys - prompt.metadata.keys()):
                raise ValueError(
                    f"{name or 'reward'}: {type(reward).__name__} needs the metadata {missing}, which the {which} "
                    f"prompt {prompt.text!r} has not. Add them to the prompt, or use another reward."
                )


def check_disk(run_dir: Path, parameters: Mapping[str, Tensor], *, copies: int) -> None:
    """Refuse to train for hours towards a checkpoint that the disk cannot hold.

    Args:
        parameters: that are trained.
        copies: of them in a checkpoint: the sets, and the optimizer's two moments.

    Raises:
        ValueError: with the size of a checkpoint and the space there is.
    """
    size = copies * sum(value.numel() * value.element_size() for value in parameters.values())
    free = shutil.disk_usage(run_dir).free
    if free < size:
        raise ValueError(
            f"{run_dir}: a checkpoint takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free. Free some space, or "
            "choose a folder on another disk with --run-dir."
        )
