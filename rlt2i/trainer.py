"""The training loop: collect, learn, judge, remember, survive."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from rlt2i.algorithm import Algorithm
from rlt2i.artifacts import read_evaluation, write_evaluation, write_maps
from rlt2i.auto import asks_for_auto, resolve_auto
from rlt2i.checkpoint import (
    Checkpoint,
    CheckpointError,
    clean_staging,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside_after,
)
from rlt2i.config import recipe_hash
from rlt2i.dry_run import batch_plan
from rlt2i.engine import Collected, Engine, Stopwatch
from rlt2i.evaluate import Evaluation, evaluate
from rlt2i.functional.maps import effective_support, map_entropy
from rlt2i.interfaces import Policy
from rlt2i.learner import Learner, UpdateRefused
from rlt2i.optimizer_state import optimizer_tensors, restore_optimizer
from rlt2i.processes import Processes
from rlt2i.progress import summary_line
from rlt2i.runlog import RunDirectory, RunLog
from rlt2i.signals import GracefulStop
from rlt2i.tasks.base import as_prompts, check_metadata
from rlt2i.weights import ParameterSets

if TYPE_CHECKING:
    from rlt2i.recipes import Recipe

MAPS_SHOWN = 6
"""Rollouts whose allocation maps are kept at each evaluation."""


class RunStopped(RuntimeError):
    """Training cannot go on; what was learned so far is saved."""


@attrs.define
class Trainer:
    """One run of one recipe.

    Attributes:
        recipe: resolved: nothing in it says "auto".
        run_dir: where it leaves its files.
        log: its metrics, on the first process.
        processes: this process among the others.
        engine, learner: collect and optimise.
        say: prints a line for the user.
        start: identity of the starting weights, the reference: they are made again, not saved again.
    """

    recipe: Recipe
    run_dir: Path
    log: _Logbook | None
    processes: Processes
    engine: Engine
    learner: Learner
    say: Callable[[str], None]
    start: str
    update: int = 0
    base: Evaluation | None = None
    mentioned: bool = False

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    def train(self, stop: GracefulStop) -> None:
        """Run until the last update, or until asked to stop; always leaves a checkpoint of the last finished update."""
        train = self.recipe.train
        if train.eval_prompts and self.update == 0:
            self._judge(first=True)
        while self.update < train.updates and not self.processes.any(stop.requested):
            metrics = self._one_update()
            self.update += 1
            last = self.update == train.updates
            if train.eval_prompts and (last or (train.eval_every and self.update % train.eval_every == 0)):
                metrics |= self._judge(first=False)
            self._remember(metrics)
            if last or self.update % train.checkpoint_every == 0 or self.processes.any(stop.requested):
                self._save()

    # ------------------------------------------------------------------------------------------------- one update

    def _one_update(self) -> dict[str, Any]:
        train, watch = self.recipe.train, Stopwatch(device=self.engine.device)
        error: Exception | None = None
        collected: Collected | None = None
        try:
            collected = self._collect(watch)
        except (ValueError, RuntimeError, OSError) as caught:
            error = caught
        self._agree(error)
        assert collected is not None
        invalid = 1 - self.processes.mean(collected.experience.rewards.valid.float())
        if invalid > train.max_invalid_share:
            self._save()
            raise RunStopped(
                f"update {self.update + 1}: {invalid:.0%} of the rewards are invalid, more than max_invalid_share="
                f"{train.max_invalid_share:.0%}. Nothing was learned from this batch and the last update is saved. "
                "Mend the "
                f"reward, then resume with --resume latest."
            )
        with watch("update"):
            try:
                metrics: dict[str, Any] = dict(self.learner.learn(collected.experience, watch.advance))
            except UpdateRefused:
                self._save()
                raise
        self._mention_uniform_prompts(collected)
        metrics |= self._observations(collected) | {f"seconds/{k}": v for k, v in watch.seconds.items()}
        metrics["rewards/invalid"] = invalid
        if train.reference:
            metrics["kl/base"] = self._drift(collected)
        if self._shows_maps():
            self._keep_maps(collected)
        return metrics

    def _collect(self, watch: Stopwatch) -> Collected:
        train = self.recipe.train
        per_process = train.prompts_per_update // self.processes.world_size
        start = self.update * train.prompts_per_update + self.processes.rank * per_process
        drawn = self.recipe.task.train_prompts(seed=train.seed, start=start, count=per_process)
        prompts = as_prompts(drawn, group_size=train.group_size, start=start)
        with self.learner.sets.use(self.learner.objective.rollout_weights):
            return self.engine.collect(prompts, progress=self.update, watch=watch)

    def _mention_uniform_prompts(self, collected: Collected) -> None:
        """Say once that a prompt has no word that a map could start from."""
        texts = prompts_without_core(collected)
        if texts and self.engine.algorithm.captures and not self.mentioned:
            self.mentioned = True
            self.say(f"note: no core word found in {texts[0]!r}; the credit of such prompts is uniform in space")

    def _agree(self, error: Exception | None) -> None:
        """Raise on every process when any of them failed, so that nobody waits for a collective that never comes."""
        if self.processes.any(error is not None):
            raise error or RunStopped(f"update {self.update + 1}: another process failed; see its message.")

    def _observations(self, collected: Collected) -> dict[str, float]:
        """What the log says about a batch, as means over all processes."""
        experience, rewards = collected.experience, collected.experience.rewards
        kept = rewards.valid
        by_group = rewards.final.view(-1, collected.prompts.group_size)
        tied = (by_group.amax(1) - by_group.amin(1)) == 0
        seen = {
            "reward/mean": rewards.final[kept],
            "reward/spread": by_group.std(dim=1, correction=0),
            "reward/tied_groups": tied.float(),
            **{f"reward/{name}": values[kept] for name, values in rewards.terms.items()},
        }
        weight = experience.credit.weight
        if weight.shape[2:] != (1, 1):
            seen |= {"map/entropy": map_entropy(weight), "map/effective_support": effective_support(weight)}
        metrics = {name: self.processes.mean(values) for name, values in seen.items()}
        if weight.numel() > 1:
            metrics["map/max"] = float(weight.max())
        return metrics

    @torch.no_grad()
    def _drift(self, collected: Collected, count: int = 32) -> float:
        """mean (v - v_base)^2 on a few (rollout, step) pairs: how far the policy has moved from where it began."""
        experience = collected.experience
        rollouts = torch.arange(min(count, experience.num_rollouts), device=self.engine.device)
        pairs = experience.pairs(rollouts, rollouts % experience.trajectory.num_steps)
        now = self.policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning)
        with self.learner.sets.use("reference"):
            base = self.policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning)
        return self.processes.mean((now - base).pow(2).mean(dim=(1, 2, 3)))

    # ------------------------------------------------------------------------------------------------- judgement

    def _judge(self, *, first: bool) -> dict[str, Any]:
        """Evaluate the weights that would be shipped: the average where there is one, else the online weights."""
        train = self.recipe.train
        watch = Stopwatch(device=self.engine.device)
        shipped = "ema" if train.ema_decay is not None else "online"
        with watch("eval"), self.learner.sets.use(shipped):
            result = evaluate(
                self.policy,
                self.engine.algorithm.reward,
                self.recipe.task.eval_prompts(train.eval_prompts),
                num_steps=train.eval_steps,
                seed=train.eval_seed,
                image_size=train.image_size,
                images_per_chunk=train.images_per_device,
                device=self.engine.device,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
                gather=self.processes.gather,
            )
        if first:
            self.base = result
        metrics = result.metrics(None if first else self.base) | {"seconds/eval": watch.seconds["eval"]}
        if self.processes.is_main:
            write_evaluation(self.run_dir / "images" / f"eval-{self.update:06d}.safetensors", result)
        self._remember(metrics, phase="eval")
        return metrics

    def _remember(self, metrics: Mapping[str, Any], *, phase: str = "train") -> None:
        if self.log is not None:
            self.log.log(self.update, metrics, phase=phase)
        if phase == "train" or self.update == 0:
            self.say(summary_line(self.update, metrics))

    def _shows_maps(self) -> bool:
        train, done = self.recipe.train, self.update + 1
        return self.update == 0 or done == train.updates or (train.eval_every > 0 and done % train.eval_every == 0)

    def _keep_maps(self, collected: Collected) -> None:
        if collected.experience.credit.weight.shape[2:] == (1, 1) or not self.processes.is_main:
            return
        path = self.run_dir / "maps" / f"step-{self.update + 1:06d}.safetensors"
        write_maps(path, collected, self.policy, shown=MAPS_SHOWN)

    # --------------------------------------------------------------------------------------------------- survival

    def _save(self) -> None:
        """A complete checkpoint of the last finished update."""
        if self.processes.is_main:
            tensors: dict[str, dict[str, Tensor]] = {"online": dict(self.policy.trainable_parameters())}
            for name in self.learner.sets.names:
                if name != "reference":  # the starting weights: their identity is enough to make them again
                    tensors[name] = self.learner.sets.values(name)
            moments, hyper = optimizer_tensors(self.learner.optimizer, self.policy.trainable_parameters())
            tensors["optimizer"] = moments
            # Nothing of ours draws from the global generator; a reward of somebody else's may.
            tensors["rng"] = {"torch": torch.get_rng_state()}
            state = {
                "update": self.update,
                "num_updates": self.learner.num_updates,
                "optimizer": hyper,
                "recipe": _continuity(self.recipe),
                "start": self.start,
            }
            save_checkpoint(
                self.run_dir,
                self.update,
                tensors=tensors,
                state=state,
                export=self._export,
                keep=self.recipe.train.keep_checkpoints,
            )
        self.processes.wait()

    def _export(self, folder: Path) -> None:
        shipped = "ema" if self.recipe.train.ema_decay is not None else "online"
        with self.learner.sets.use(shipped):
            self.policy.export(folder)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, bit for bit.

        Raises:
            CheckpointError: when it belongs to other weights or another recipe.
        """
        state = checkpoint.state
        for key, mine in (("start", self.start), ("recipe", _continuity(self.recipe))):
            if state[key] != mine:
                what = "starting weights" if key == "start" else "recipe"
                raise CheckpointError(
                    f"{checkpoint.path}: saved with another {what} ({state[key][:12]}, now {mine[:12]}), so the run "
                    "would not "
                    "continue but turn into something else. Resume with the recipe.yaml of the run directory, or "
                    "start a new run."
                )
        parameters = self.policy.trainable_parameters()
        for name in ("online", *self.learner.sets.names):
            if name != "reference":
                self.learner.sets.load(name, checkpoint.tensors[name])
        restore_optimizer(self.learner.optimizer, parameters, checkpoint.tensors["optimizer"], state["optimizer"])
        torch.set_rng_state(checkpoint.tensors["rng"]["torch"])
        self.update, self.learner.num_updates = state["update"], state["num_updates"]
        first = self.run_dir / "images" / "eval-000000.safetensors"
        if self.recipe.train.eval_prompts and first.exists():
            self.base = read_evaluation(first, self.recipe.task.eval_prompts(self.recipe.train.eval_prompts))


def prompts_without_core(collected: Collected) -> list[str]:
    """The prompts of a batch in whose tokens no core phrase was found."""
    spans = collected.experience.trajectory.conditioning.token_spans
    return [text for text, found in zip(collected.prompts.texts, spans, strict=False) if not found]


def train(recipe: Recipe, run_dir: Path, *, resume: Path | str | None = None) -> None:
    """Train a recipe into a run directory, from the beginning or from a checkpoint.

    Launch it with `accelerate launch` or `torchrun` for several devices; results do not depend on how many.

    Args:
        resume: None for a new run, "latest", or a checkpoint folder.

    Raises:
        ValueError: when recipe, batch arithmetic or task do not work out; nothing has been loaded then.
        RunStopped: when training cannot go on; what was learned is saved.
    """
    processes = Processes()
    train = recipe.train
    recipe.algorithm().check_group_size(train.group_size)
    check_metadata(recipe.task, recipe.reward)
    batch = batch_plan(recipe, world_size=processes.world_size)
    say: Callable[[str], None] = print if processes.is_main else lambda _: None
    recipe = _resolved(recipe, run_dir if resume is not None else None, processes, say)
    with contextlib.ExitStack() as stack:
        # Only the first process writes; the others learn of its failure to take the directory at the next collective.
        log = stack.enter_context(_logbook(recipe, run_dir, resume is not None, processes))
        stop = stack.enter_context(GracefulStop())
        algorithm = recipe.algorithm().load(processes.device)
        trainer = _assemble(recipe, algorithm, run_dir, log, processes, say)
        if resume is None:
            say(batch.table())
        else:
            trainer.restore(_checkpoint(run_dir, resume))
            if log is not None:
                log.rewind(trainer.update)
            say(f"resuming after update {trainer.update} of {train.updates}")
        trainer.train(stop)
        if trainer.update < train.updates:
            say(f"stopped after update {trainer.update}, saved. Go on with: rlt2i train --run {run_dir} --resume")


class _Logbook:
    """Run directory and log of the first process; opened in the right order around a rewind."""

    def __init__(self, recipe: Recipe, run_dir: Path, resumed: bool) -> None:
        mapping = recipe.mapping()
        self._run = RunDirectory.open(run_dir) if resumed else RunDirectory.create(run_dir, mapping, recipe.hash)
        clean_staging(run_dir)
        self._trackers = recipe.train.trackers
        self._log: RunLog | None = None

    def rewind(self, update: int) -> None:
        """Forget what came after `update`, so that no update is logged or kept twice."""
        set_aside_after(self._run.path, update)
        self._run.rewind(update)

    def log(self, update: int, metrics: Mapping[str, Any], *, phase: str = "train") -> None:
        if self._log is None:
            self._log = RunLog(self._run, trackers=self._trackers)
        self._log.log(update, metrics, phase=phase)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        self._run.close()


@contextlib.contextmanager
def _logbook(recipe: Recipe, run_dir: Path, resumed: bool, processes: Processes) -> Iterator[_Logbook | None]:
    if not processes.is_main:
        yield None
        return
    book = _Logbook(recipe, run_dir, resumed)
    try:
        yield book
    finally:
        book.close()


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


# What may differ between a run and its continuation: how long it is and what is recorded of it.
_FREE_TO_CHANGE = ("updates", "eval_every", "checkpoint_every", "keep_checkpoints", "trackers", "max_invalid_share")


def _continuity(recipe: Recipe) -> str:
    """SHA-256 of everything that decides the weights after a given number of updates."""
    mapping = recipe.mapping()
    mapping["train"] = {k: v for k, v in mapping["train"].items() if k not in _FREE_TO_CHANGE}
    return recipe_hash(mapping)


def _assemble(
    recipe: Recipe,
    algorithm: Algorithm,
    run_dir: Path,
    log: _Logbook | None,
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
        optimizer=optimizer,
        sets=sets,
        sequences_per_chunk=train.sequences_per_device,
        updates_per_rollout=train.updates_per_rollout,
        max_grad_norm=train.max_grad_norm,
        ema_decay=train.ema_decay,
        seed=train.seed,
        warmup_updates=train.warmup_updates,
        reduce_sum=processes.sum if processes.world_size > 1 else None,
    )
    engine = Engine(
        algorithm=algorithm,
        image_size=train.image_size,
        images_per_chunk=train.images_per_device,
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
        start=_identity(parameters),
    )


def _identity(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 of the starting weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
