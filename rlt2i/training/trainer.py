"""The training loop: collect, learn, judge, remember, survive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.config import recipe_hash
from rlt2i.distributed import Processes
from rlt2i.engine import Collected, Engine, Stopwatch
from rlt2i.evaluation.artifacts import read_evaluation, write_evaluation, write_maps
from rlt2i.evaluation.health import diversity_metrics, health_metrics
from rlt2i.evaluation.heldout import Evaluation, evaluate
from rlt2i.interfaces import Policy
from rlt2i.learner import Learner, UpdateRefused
from rlt2i.recipes.recipe import Recipe
from rlt2i.rewards.agreement import FailureCounts
from rlt2i.runs.checkpoint import (
    Checkpoint,
    CheckpointError,
    save_checkpoint,
)
from rlt2i.runs.logbook import Logbook
from rlt2i.runs.metrics import read_metrics
from rlt2i.runs.optimizer_state import optimizer_tensors, restore_optimizer
from rlt2i.runs.terminal import summary_line
from rlt2i.tasks.base import as_prompts
from rlt2i.training.alarm import hacking_alarms
from rlt2i.training.observations import observations
from rlt2i.training.signals import GracefulStop

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
    log: Logbook | None
    processes: Processes
    engine: Engine
    learner: Learner
    say: Callable[[str], None]
    start: str
    iteration: int = 0
    base: Evaluation | None = None
    mentioned: bool = False

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    def train(self, stop: GracefulStop) -> None:
        """Run until the last iteration, or until asked to stop; always leaves a checkpoint of the last finished one."""
        train = self.recipe.train
        if self._evaluation_is_due():
            if self._evaluation_is_missing():
                self._judge(first=self.iteration == 0)
            elif self.iteration == 0 and self.base is None:
                self._adopt_base()
        while self.iteration < train.iterations and not self.processes.any(stop.requested):
            metrics = self._one_iteration()
            self.iteration += 1
            last = self.iteration == train.iterations
            if self._evaluation_is_due():
                try:
                    metrics |= self._judge(first=False)
                except RunStopped:
                    self._remember(metrics)  # the iteration is finished, although nothing could be said about it
                    raise
                self._watch_for_hacking(metrics)
            self._remember(metrics)
            if last or self.iteration % train.checkpoint_every == 0 or self.processes.any(stop.requested):
                self._save()

    # ------------------------------------------------------------------------------------------------- one iteration

    def _one_iteration(self) -> dict[str, Any]:
        train, watch = self.recipe.train, Stopwatch(device=self.engine.device)
        error: Exception | None = None
        collected: Collected | None = None
        try:
            collected = self._collect(watch)
        except (ValueError, RuntimeError, OSError) as caught:
            error = caught
        self._agree(error)
        assert collected is not None
        lost = 1 - self.processes.mean(collected.experience.rewards.valid.float())
        tally = collected.tally.together(self.processes.gather, self.engine.device)
        invalid = max(lost, tally.share)
        self._stop_if_broken(tally, invalid, "train", "Nothing was learned from this batch")
        with watch("update"):
            try:
                metrics: dict[str, Any] = dict(self.learner.learn(collected.experience, watch.advance))
            except UpdateRefused:
                self._save()
                raise
        self._mention_uniform_prompts(collected)
        metrics |= observations(collected, self.processes.mean) | {f"seconds/{k}": v for k, v in watch.seconds.items()}
        metrics["rewards/invalid"] = invalid
        if train.group_size > 1:
            differing = diversity_metrics(collected.images, train.group_size)
            metrics |= {name: self.processes.mean(values) for name, values in differing.items()}
        if train.reference:
            metrics["kl/base"] = self._drift(collected)
        if self._shows_maps():
            self._keep_maps(collected)
        return metrics

    def _collect(self, watch: Stopwatch) -> Collected:
        train = self.recipe.train
        first = self.iteration * train.prompts_per_iteration
        mine = shard_prompts(
            train.prompts_per_iteration,
            parts=train.optimizer_steps_per_iteration,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        stream = self.recipe.task.train_prompts(seed=train.seed, start=first, count=train.prompts_per_iteration)
        prompts = as_prompts([stream[i] for i in mine], group_size=train.group_size)
        prompts = attrs.evolve(prompts, draws=tuple(first + i for i in mine))
        with self.learner.sets.use(self.learner.objective.rollout_weights):
            return self.engine.collect(prompts, iteration=self.iteration, watch=watch)

    def _mention_uniform_prompts(self, collected: Collected) -> None:
        """Say once that a prompt has no word that a map could start from."""
        texts = prompts_without_core(collected)
        if texts and self.engine.algorithm.captures and not self.mentioned:
            self.mentioned = True
            self.say(f"note: no core word found in {texts[0]!r}; the credit of such prompts is uniform in space")

    def _agree(self, error: Exception | None) -> None:
        """Raise on every process when any of them failed, so that nobody waits for a collective that never comes."""
        if self.processes.any(error is not None):
            raise error or RunStopped(f"iteration {self.iteration + 1}: another process failed; see its message.")

    def _stop_if_broken(self, tally: FailureCounts, share: float, phase: str, consequence: str) -> None:
        """Write down why images were not judged; stop, on every process, when they are too many.

        Raises:
            RunStopped: with the most frequent reasons.
        """
        iteration, limit = self.iteration + (phase == "train"), self.recipe.train.max_invalid_share
        if tally.invalid and self.log is not None:
            self.log.failures(iteration, tally.reasons, images=tally.images, phase=phase)
        if share <= limit:
            return
        self._save()
        raise RunStopped(
            f"{'iteration' if phase == 'train' else 'evaluation after iteration'} {iteration}: {share:.0%} of the "
            f"rewards are invalid, more than max_invalid_share={limit:.0%}. Why: {tally}. {consequence}, and "
            "the last iteration is saved. Mend the reward, then resume with --resume latest."
        )

    @torch.no_grad()
    def _drift(self, collected: Collected, count: int = 32) -> float:
        """mean (v - v_base)^2 on a few (rollout, step) pairs: how far the policy has moved from where it began."""
        experience = collected.experience
        rollouts = torch.arange(min(count, experience.num_rollouts), device=self.engine.device)
        pairs = experience.step_batch(rollouts, rollouts % experience.trajectory.num_steps)
        now = self.policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning)
        with self.learner.sets.use("reference"):
            base = self.policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning)
        return self.processes.mean((now - base).pow(2).mean(dim=(1, 2, 3)))

    # ------------------------------------------------------------------------------------------------- judgement

    def _evaluation_is_due(self) -> bool:
        """Before the first iteration, after the last, and every so often in between."""
        train, done = self.recipe.train, self.iteration
        regular = train.eval_every > 0 and done % train.eval_every == 0
        return train.eval_prompts > 0 and (done in (0, train.iterations) or regular)

    def _evaluation_file(self) -> Path:
        return self.run_dir / "images" / f"eval-{self.iteration:06d}.safetensors"

    def _evaluation_is_missing(self) -> bool:
        """Whether the weights at hand were not judged yet: at the start, or where the reward failed at it."""
        return self.processes.any(self.processes.is_main and not self._evaluation_file().exists())

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
                rollout_batch_size=train.rollout_batch_size,
                device=self.engine.device,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
                gather=self.processes.gather,
                heldout=self.recipe.heldout,
            )
        tally = FailureCounts(images=len(result.valid), reasons=Counter(result.reasons))
        share = 1 - float(result.valid.float().mean())
        self._stop_if_broken(tally, share, "eval", "Nothing can be said about these weights")
        if first:
            self.base = result
        metrics = result.metrics(None if first else self.base) | {"seconds/eval": watch.seconds["eval"]}
        metrics |= {name: float(value) for name, value in health_metrics(result.images).items()}
        if self.processes.is_main:
            write_evaluation(self._evaluation_file(), result)
        self._remember(metrics, phase="eval")
        return metrics

    def _adopt_base(self) -> None:
        """Take over how the starting weights were judged elsewhere: runs of a benchmark share their start."""
        self.base = read_evaluation(
            self._evaluation_file(), self.recipe.task.eval_prompts(self.recipe.train.eval_prompts)
        )
        health = {name: float(value) for name, value in health_metrics(self.base.images).items()}
        self._remember(self.base.metrics() | health, phase="eval")

    def _watch_for_hacking(self, metrics: dict[str, Any]) -> None:
        """Compare with the base and the first iteration, as they were logged."""
        if self.log is None or self.base is None:
            return
        before = {
            k: v for phase in ("train", "eval") for k, v in next(iter(read_metrics(self.run_dir, phase)), {}).items()
        }
        alarms = hacking_alarms(before, metrics, headline=self.base.headline)
        metrics["alarms"] = float(len(alarms))
        if alarms:
            self.say(f"alarm: the trained reward rose while {'; '.join(alarms)}. Look at the images of the report.")

    def _remember(self, metrics: Mapping[str, Any], *, phase: str = "train") -> None:
        if self.log is not None:
            self.log.log(self.iteration, metrics, phase=phase)
        if phase == "train" or self.iteration == 0:
            self.say(summary_line(self.iteration, metrics))

    def _shows_maps(self) -> bool:
        train, done = self.recipe.train, self.iteration + 1
        return (
            self.iteration == 0 or done == train.iterations or (train.eval_every > 0 and done % train.eval_every == 0)
        )

    def _keep_maps(self, collected: Collected) -> None:
        if collected.experience.credit.weight.shape[2:] == (1, 1) or not self.processes.is_main:
            return
        path = self.run_dir / "maps" / f"step-{self.iteration + 1:06d}.safetensors"
        write_maps(path, collected, self.policy, shown=MAPS_SHOWN)

    # --------------------------------------------------------------------------------------------------- survival

    def _save(self) -> None:
        """A complete checkpoint of the last finished iteration."""
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
                "iteration": self.iteration,
                "optimizer_step": self.learner.optimizer_step,
                "optimizer": hyper,
                "recipe": continuity(self.recipe),
                "start": self.start,
            }
            save_checkpoint(
                self.run_dir,
                self.iteration,
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
        for key, mine in (("start", self.start), ("recipe", continuity(self.recipe))):
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
        self.iteration, self.learner.optimizer_step = state["iteration"], state["optimizer_step"]
        first = self.run_dir / "images" / "eval-000000.safetensors"
        if self.recipe.train.eval_prompts and first.exists():
            self.base = read_evaluation(first, self.recipe.task.eval_prompts(self.recipe.train.eval_prompts))


def shard_prompts(count: int, *, parts: int, rank: int, world_size: int) -> list[int]:
    """The prompts of one process, of `count` in all.

    The stream is cut into one block per optimiser step first and each block among the processes second, so that every
    step sees the same prompts however many processes there are.
    """
    block = count // parts
    share = block // world_size
    return [part * block + rank * share + i for part in range(parts) for i in range(share)]


def prompts_without_core(collected: Collected) -> list[str]:
    """The prompts of a batch in whose tokens no core phrase was found."""
    spans = collected.experience.trajectory.conditioning.token_spans
    return [text for text, found in zip(collected.prompts.texts, spans, strict=False) if not found]


# What may differ between a run and its continuation: how long it is and what is recorded of it.
_FREE_TO_CHANGE = ("iterations", "eval_every", "checkpoint_every", "keep_checkpoints", "trackers", "max_invalid_share")


def continuity(recipe: Recipe) -> str:
    """SHA-256 of everything that decides the weights after a given number of iterations."""
    mapping = recipe.mapping()
    mapping["train"] = {k: v for k, v in mapping["train"].items() if k not in _FREE_TO_CHANGE}
    return recipe_hash(mapping)
