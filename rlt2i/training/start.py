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
from rlt2i.config.secrets import redacted
from rlt2i.distributed import Distributed, Stopped
from rlt2i.engine import Engine
from rlt2i.evaluation.auto import asks_for_auto, resolve_auto
from rlt2i.interfaces import Policy
from rlt2i.learner import Learner
from rlt2i.parameter_sets import ParameterSets, tensors_sha256
from rlt2i.policies.pretrained.loading import network_on_host
from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.checkpoint import CheckpointError, has_checkpoint, latest_checkpoint, load_checkpoint
from rlt2i.runs.directory import INPUTS
from rlt2i.runs.files import replace_text
from rlt2i.runs.generators import seed_global_generators
from rlt2i.runs.identity import changes, inputs_of, read_inputs, remember_code
from rlt2i.runs.logbook import Logbook
from rlt2i.tasks.base import TaskPrompt
from rlt2i.tasks.reading import MOST_DRAWN, report_on
from rlt2i.training.preflight import check_before_weights, check_disk
from rlt2i.training.sharding import Sharding
from rlt2i.training.signals import GracefulStop
from rlt2i.training.trainer import Trainer


def train(recipe: Recipe, run_dir: Path, *, resume: Path | str | None = None, accept_changes: bool = False) -> None:
    """Train a recipe into a run directory, from the beginning or from a checkpoint.

    Launch it with `accelerate launch` or `torchrun` for several devices; results do not depend on how many, beyond the
    order in which sums are rounded. A directory whose run was stopped before its first checkpoint is started over.

    Args:
        resume: None for a new run; "latest" (or "auto") to go on from the newest checkpoint, or to start where there is
            none yet; or a checkpoint folder.
        accept_changes: go on although data files or modules that the recipe reads have other content than when the run
            was started; what changed is written down.

    Raises:
        ValueError: when recipe, batch arithmetic or task do not work out; nothing has been loaded then.
        RunStopped: when training cannot go on; what was learned is saved.
    """
    train = recipe.train
    distributed = Distributed(timeout=train.process_timeout)
    say: Callable[[str], None] = functools.partial(print, flush=True) if distributed.is_main else lambda _: None
    batch, path = distributed.raise_on_all(
        lambda: (check_before_weights(recipe, world_size=distributed.world_size), _checkpoint_path(run_dir, resume)),
        "checking the recipe",
    )
    if resume is not None and path is None:
        say(f"{run_dir}: no checkpoint yet, so the run starts at the beginning")
    recipe = _resolved(recipe, run_dir if path is not None else None, distributed, say)
    seed_global_generators("global", train.seed)  # loading must draw the same everywhere
    with contextlib.ExitStack() as stack:
        log = distributed.raise_on_all(
            lambda: _logbook(recipe, run_dir, path, accept_changes, say) if distributed.is_main else None,
            "taking the run directory",
        )
        if log is not None:
            stack.callback(log.close)
        stop = stack.enter_context(GracefulStop())
        with network_on_host() if train.sharding != "none" and distributed.world_size > 1 else contextlib.nullcontext():
            algorithm = distributed.raise_on_all(lambda: recipe.algorithm().load(distributed.device), "loading")
        for reward in (algorithm.reward, *recipe.heldout.values()):
            stack.callback(reward.close)
        trainer = assemble(recipe, algorithm, run_dir, log, distributed, say, stop)
        distributed.raise_on_all(lambda: _write_down(trainer, algorithm), "writing down the reward")
        seed_global_generators("global", train.seed, distributed.rank)
        if path is None:
            say(batch.table())
        else:
            checkpoint = distributed.raise_on_all(lambda: load_checkpoint(path), "reading the checkpoint")
            try:
                trainer.restore(checkpoint)
            except Stopped:
                say(f"stopped before going on after iteration {checkpoint.step}; the run is as it was")
                return
            if log is not None and (dropped := log.rewind(trainer.iteration)):
                say(f"{len(dropped)} lines of metrics after it, or damaged, are set aside in metrics.dropped.jsonl")
            say(f"resuming after iteration {trainer.iteration} of {train.iterations}")
        trainer.train()
        if trainer.iteration < train.iterations:
            again = f"rlt2i train --run-dir {run_dir} --resume"
            kept = "saved" if trainer.iteration else "nothing to save yet"
            say(f"stopped after iteration {trainer.iteration}, {kept}. Go on with: {again}")


def _prompts_of(recipe: Recipe) -> Iterator[TaskPrompt]:
    """What a run trains on, up to a number, and what it evaluates on."""
    train = recipe.train
    count = min(train.iterations * train.prompts_per_iteration, MOST_DRAWN)
    yield from recipe.task.train_prompts(seed=train.seed, start=0, count=count)
    if train.eval_prompts:
        yield from recipe.task.eval_prompts(train.eval_prompts)


def _checkpoint_path(run_dir: Path, resume: Path | str | None) -> Path | None:
    """The checkpoint to go on from; None to start at the beginning."""
    if resume is None:
        return None
    if resume not in ("latest", "auto"):
        return Path(resume)
    path = latest_checkpoint(run_dir)
    if path is None and has_checkpoint(run_dir):
        raise CheckpointError(
            f"{run_dir}: holds no complete checkpoint to resume from. Start again in a new directory."
        )
    return path


def _logbook(
    recipe: Recipe, run_dir: Path, checkpoint: Path | None, accept_changes: bool, say: Callable[[str], None]
) -> Logbook:
    inputs = inputs_of(recipe)
    remember_code(recipe)
    before = read_inputs(run_dir / INPUTS) if checkpoint is not None else None
    changed = changes(before, inputs) if before is not None else []
    if changed and not accept_changes:
        listed = "\n".join(f"  {line}" for line in changed)
        raise ValueError(
            f"{run_dir}: what the run reads has changed since it was started, so it would turn into something else:\n"
            f"{listed}\nPut it back, or go on with it and have that written down: --accept-changes"
        )
    for line in changed:
        say(f"accepted: {line}")
    return Logbook(recipe, run_dir, resumed=checkpoint is not None, inputs=inputs, accepted=changed)


def _write_down(trainer: Trainer, algorithm: Algorithm) -> None:
    """Which rewards judge, whether a checkpoint will fit, and what prompts lose; on the first process."""
    if not trainer.distributed.is_main:
        return
    recipe, run_dir = trainer.recipe, trainer.run_dir
    copies = 3 + len(trainer.learner.saved_sets)
    check_disk(run_dir, trainer.policy.trainable_parameters(), copies=copies)
    _write_json(run_dir / "reward.json", algorithm.reward.fingerprint())
    if recipe.heldout:
        _write_json(run_dir / "heldout.json", {n: r.fingerprint() for n, r in recipe.heldout.items()})
    for line in report_on(trainer.policy, _prompts_of(recipe)).lines():
        trainer.say(line)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(redacted(value), indent=2, sort_keys=True, default=str) + "\n")


def _resolved(recipe: Recipe, run_dir: Path | None, distributed: Distributed, say: Callable[[str], None]) -> Recipe:
    """The recipe without "auto": measured for a new run, read from the run directory for one that goes on."""
    if not asks_for_auto(recipe):
        return recipe
    if run_dir is not None:
        from rlt2i.recipes import load_recipe

        return attrs.evolve(recipe, credit=load_recipe(run_dir).credit)
    resolved, measured = resolve_auto(recipe, device=distributed.device)
    if measured is not None:
        direction, block = measured.best()
        say(f"attention maps against known regions, AUC over {measured.images} images:\n{measured.table()}")
        say(f"chosen: {direction}, block {block}")
    return resolved


def assemble(
    recipe: Recipe,
    algorithm: Algorithm,
    run_dir: Path,
    log: Logbook | None,
    distributed: Distributed,
    say: Callable[[str], None],
    stop: GracefulStop,
) -> Trainer:
    """Engine, learner and the rest, around a loaded policy."""
    train, policy = recipe.train, algorithm.policy
    assert isinstance(policy, Policy)
    start = tensors_sha256(policy.trainable_parameters())
    sharding = Sharding.of(policy, train.sharding, distributed)
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
    if sharding is not None:
        sharding.watch(sets)
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
        reduce_sum=distributed.sum if distributed.world_size > 1 else None,
    )
    engine = Engine(
        algorithm=algorithm,
        image_size=train.image_size,
        rollout_batch_size=train.rollout_batch_size,
        seed=train.seed,
        share_initial_noise=train.share_initial_noise,
        device=distributed.device,
        gather=distributed.gather,
        rank=distributed.rank,
    )
    return Trainer(
        recipe=recipe,
        run_dir=run_dir,
        log=log,
        distributed=distributed,
        engine=engine,
        learner=learner,
        say=say,
        start=start,
        stop=stop,
        sharding=sharding,
    )
