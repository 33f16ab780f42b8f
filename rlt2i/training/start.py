"""Start a run or go on with it: check, resolve, load, assemble, train."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from rlt2i.algorithm import Algorithm
from rlt2i.distributed import Processes
from rlt2i.engine import Engine
from rlt2i.evaluation.auto import asks_for_auto, resolve_auto
from rlt2i.interfaces import Policy
from rlt2i.learner import Learner
from rlt2i.parameter_sets import ParameterSets, tensors_sha256
from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint
from rlt2i.runs.logbook import Logbook, open_logbook
from rlt2i.tasks.base import TaskPrompt, check_metadata
from rlt2i.tasks.reading import MOST_DRAWN, report_on
from rlt2i.training.dry_run import batch_plan, check_sizes
from rlt2i.training.signals import GracefulStop
from rlt2i.training.trainer import Trainer


def train(recipe: Recipe, run_dir: Path, *, resume: Path | str | None = None) -> None:
    """Train a recipe into a run directory, from the beginning or from a checkpoint.

    Launch it with `accelerate launch` or `torchrun` for several devices; results do not depend on how many.

    Args:
        resume: None for a new run, "latest", or a checkpoint folder.

    Raises:
        ValueError: when recipe, batch arithmetic or task do not work out; nothing has been loaded then.
        RunStopped: when training cannot go on; what was learned is saved.
    """
    train = recipe.train
    processes = Processes(timeout=train.process_timeout)
    recipe.algorithm().check_group_size(train.group_size)
    check_metadata(recipe.task, recipe.sampler, recipe.reward, *recipe.heldout.values())
    check_sizes(recipe)
    batch = batch_plan(recipe, world_size=processes.world_size)
    say: Callable[[str], None] = functools.partial(print, flush=True) if processes.is_main else lambda _: None
    recipe = _resolved(recipe, run_dir if resume is not None else None, processes, say)
    with contextlib.ExitStack() as stack:
        # Only the first process writes; the others learn of its failure to take the directory at the next collective.
        log = stack.enter_context(open_logbook(recipe, run_dir, resume is not None, processes))
        stop = stack.enter_context(GracefulStop())
        algorithm = recipe.algorithm().load(processes.device)
        for reward in (algorithm.reward, *recipe.heldout.values()):
            stack.callback(reward.close)
        if processes.is_main:
            _write_json(run_dir / "reward.json", algorithm.reward.fingerprint())
            if recipe.heldout:
                _write_json(run_dir / "heldout.json", {n: r.fingerprint() for n, r in recipe.heldout.items()})
            assert isinstance(algorithm.policy, Policy)
            for line in report_on(algorithm.policy, _prompts_of(recipe)).lines():
                say(line)
        trainer = _assemble(recipe, algorithm, run_dir, log, processes, say)
        if resume is None:
            say(batch.table())
        else:
            trainer.restore(_checkpoint(run_dir, resume))
            if log is not None:
                log.rewind(trainer.iteration)
            say(f"resuming after iteration {trainer.iteration} of {train.iterations}")
        trainer.train(stop)
        if trainer.iteration < train.iterations:
            again = f"rlt2i train --run-dir {run_dir} --resume"
            say(f"stopped after iteration {trainer.iteration}, saved. Go on with: {again}")


def _prompts_of(recipe: Recipe) -> Iterator[TaskPrompt]:
    """What a run trains on, up to a number, and what it evaluates on."""
    train = recipe.train
    count = min(train.iterations * train.prompts_per_iteration, MOST_DRAWN)
    yield from recipe.task.train_prompts(seed=train.seed, start=0, count=count)
    if train.eval_prompts:
        yield from recipe.task.eval_prompts(train.eval_prompts)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def _checkpoint(run_dir: Path, resume: Path | str) -> Checkpoint:
    path = latest_checkpoint(run_dir) if resume == "latest" else Path(resume)
    if path is None:
        raise CheckpointError(
            f"{run_dir}: holds no complete checkpoint to resume from. Start again in a new directory."
        )
    return load_checkpoint(path)


def _resolved(recipe: Recipe, run_dir: Path | None, processes: Processes, say: Callable[[str], None]) -> Recipe:
    """The recipe without "auto": measured for a new run, read from the run directory for one that goes on."""
    if not asks_for_auto(recipe):
        return recipe
    if run_dir is not None:
        from rlt2i.recipes import load_recipe

        return attrs.evolve(recipe, credit=load_recipe(run_dir / "recipe.yaml").credit)
    resolved, measured = resolve_auto(recipe, device=processes.device)
    if measured is not None:
        direction, block = measured.best()
        say(f"attention maps against known regions, AUC over {measured.images} images:\n{measured.table()}")
        say(f"chosen: {direction}, block {block}")
    return resolved


def _assemble(
    recipe: Recipe,
    algorithm: Algorithm,
    run_dir: Path,
    log: Logbook | None,
    processes: Processes,
    say: Callable[[str], None],
) -> Trainer:
    """Engine, learner and the rest, around a loaded policy."""
    train, policy = recipe.train, algorithm.policy
    assert isinstance(policy, Policy)
    parameters = policy.trainable_parameters()
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=train.learning_rate,
        betas=train.betas,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = train.learning_rate
    sets = ParameterSets(parameters)
    if train.reference:
        sets.add("reference")
    learner = Learner(
        policy=policy,
        objective=algorithm.objective,
        reward=algorithm.reward,
        optimizer=optimizer,
        sets=sets,
        micro_batch_size=train.micro_batch_size,
        optimizer_steps_per_iteration=train.optimizer_steps_per_iteration,
        max_grad_norm=train.max_grad_norm,
        ema_decay=train.ema_decay,
        seed=train.seed,
        warmup_steps=train.warmup_steps,
        reduce_sum=processes.sum if processes.world_size > 1 else None,
    )
    engine = Engine(
        algorithm=algorithm,
        image_size=train.image_size,
        sizes=train.sizes,
        rollout_batch_size=train.rollout_batch_size,
        seed=train.seed,
        share_initial_noise=train.share_initial_noise,
        device=processes.device,
        gather=processes.gather,
        rank=processes.rank,
    )
    return Trainer(
        recipe=recipe,
        run_dir=run_dir,
        log=log,
        processes=processes,
        engine=engine,
        learner=learner,
        say=say,
        start=tensors_sha256(parameters),
    )
