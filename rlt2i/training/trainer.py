"""The training loop: collect, learn, evaluate, save."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.distributed import Distributed, OtherProcessFailed, Stopped, told_all
from rlt2i.engine import Collected, Engine
from rlt2i.evaluation.health import diversity_metrics, health_metrics
from rlt2i.evaluation.heldout import Evaluation, evaluate
from rlt2i.evaluation.map_samples import map_samples
from rlt2i.export.card import write_card_of_checkpoint
from rlt2i.functional.transfer import on_host
from rlt2i.interfaces import Policy
from rlt2i.learner import Learner, UpdateRefused
from rlt2i.parameter_sets import ONLINE
from rlt2i.recipes.recipe import Recipe
from rlt2i.rewards.agreement import FailureCounts, all_gather_text
from rlt2i.runs.artifacts import UnreadableFileError, evaluation_file, maps_file, read_evaluation, write_maps
from rlt2i.runs.belonging import (
    changed_rounding,
    check_recipe,
    check_shapes,
    check_state,
    continuity,
    policy_identity,
    rounding,
)
from rlt2i.runs.checkpoint import Checkpoint, save_checkpoint
from rlt2i.runs.generators import global_generators, restore_global_generators, undisturbed_generators
from rlt2i.runs.logbook import Logbook
from rlt2i.runs.metrics import read_metrics
from rlt2i.runs.optimizer_state import optimizer_tensors, restore_optimizer
from rlt2i.runs.stopwatch import Stopwatch
from rlt2i.runs.terminal import summary_line
from rlt2i.tasks.base import TaskPrompt, as_prompts
from rlt2i.tasks.curriculum import Chosen, CurriculumState, texts_without_spread
from rlt2i.training.alarm import hacking_alarms
from rlt2i.training.group_sizes import groups_by_size
from rlt2i.training.observations import observations
from rlt2i.training.sharding import Sharding
from rlt2i.training.signals import GracefulStop
from rlt2i.types import Experience

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
        distributed: this process among the others.
        engine, learner: collect and optimise.
        say: prints a line for the user.
        start: identity of the starting weights, the reference: they are made again, not saved again.
        stop: whether the user, or a scheduler, wants the run to end.
        iteration: finished so far.
        saved: how many of them are in a checkpoint.
        base: how the starting weights were judged.
        mentioned: whether the user has been told that a prompt has no word for a map to start from.
        curriculum: where the run stands in its stream of prompts.
        sharding: of a network that is spread over processes, or None.
    """

    recipe: Recipe
    run_dir: Path
    log: Logbook | None
    distributed: Distributed
    engine: Engine
    learner: Learner
    say: Callable[[str], None]
    start: str
    stop: GracefulStop = attrs.field(factory=GracefulStop)
    iteration: int = 0
    saved: int = 0
    base: Evaluation | None = None
    mentioned: bool = False
    sharding: Sharding | None = None
    curriculum: CurriculumState = attrs.field(
        default=attrs.Factory(lambda self: CurriculumState(self.recipe.train.curriculum), takes_self=True)
    )

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    def train(self) -> None:
        """Run until the last iteration, or until asked to stop.

        Whatever ends it, an exception of any kind included, leaves a checkpoint of the last finished iteration.
        """
        try:
            self._run()
        except BaseException as error:
            self._rescue(error)
            raise

    def _run(self) -> None:
        train = self.recipe.train
        if self._evaluation_is_due() and not self._stopping():
            try:
                if self._evaluation_is_missing():
                    self._judge(first=self.iteration == 0)
                elif self.iteration == 0 and self.base is None:
                    self._adopt_base()
            except Stopped:
                return
        while self.iteration < train.iterations and not self._stopping():
            metrics = self._one_iteration()
            if self._evaluation_is_due() and not self._stopping():
                try:
                    metrics |= self._judge(first=False)
                    self._watch_for_hacking(metrics)
                except Stopped:
                    pass  # judged when the run is resumed
                except Exception:
                    self._remember(metrics)  # the iteration is finished, although nothing could be said about it
                    raise
            self._remember(metrics)
            last = self.iteration == train.iterations
            if last or self.iteration % train.checkpoint_every == 0 or self._stopping():
                self._save()

    def _stopping(self) -> bool:
        return self.distributed.any(self.stop.requested)

    # ------------------------------------------------------------------------------------------------- one iteration

    def _one_iteration(self) -> dict[str, Any]:
        train, watch = self.recipe.train, Stopwatch(device=self.engine.device)
        doing = f"iteration {self.iteration + 1}"
        chosen = self.distributed.raise_on_all(self._chosen, doing=doing)
        collected = self.distributed.raise_on_all(lambda: self._collect(chosen, watch), doing=doing)
        valid = torch.cat([batch.experience.rewards.valid for batch in collected])
        lost = 1 - self.distributed.mean(valid.float())
        tally = FailureCounts.sum_of(batch.tally for batch in collected)
        tally = tally.together(self.distributed.gather, self.engine.device)
        invalid = max(lost, tally.share)
        self._stop_if_broken(tally, invalid, "train", "Nothing was learned from this batch")
        with watch("update"):
            metrics: dict[str, Any] = dict(self.learner.learn([batch.experience for batch in collected], watch.advance))
        dull = self._without_spread(collected)
        self.curriculum.learned(chosen, dull, iteration=self.iteration)
        self.iteration += 1  # from here on the weights are those of a finished iteration
        self._mention_uniform_prompts(collected)
        metrics |= observations(collected, self.distributed.mean) | {
            f"seconds/{k}": v for k, v in watch.seconds.items()
        }
        metrics |= {f"beside_seconds/{k}": v for k, v in watch.beside.items()} | self.curriculum.metrics(chosen)
        metrics["rewards/invalid"] = invalid
        if train.group_size > 1:
            differing = [diversity_metrics(batch.images, train.group_size) for batch in collected]
            metrics |= {
                name: self.distributed.mean(torch.cat([values[name] for values in differing])) for name in differing[0]
            }
        if train.reference:
            metrics["kl/base"] = self._drift(collected)
        if self._shows_maps():
            self._keep_maps(collected)
        return metrics

    def _chosen(self) -> Chosen:
        """The prompts of this iteration, of all processes."""
        train = self.recipe.train
        return self.curriculum.choose(
            lambda start, count: self.recipe.task.train_prompts(seed=train.seed, start=start, count=count),
            count=train.prompts_per_iteration,
            iteration=self.iteration,
            seed=train.seed,
        )

    def _without_spread(self, collected: list[Collected]) -> list[str]:
        """The prompts of all processes whose groups showed no difference; only asked for by a curriculum."""
        if self.curriculum.curriculum is None:
            return []
        dull: list[str] = []
        for batch in collected:
            rewards, prompts = batch.experience.rewards, batch.prompts
            dull += texts_without_spread(
                prompts.texts, on_host(rewards.final), on_host(rewards.valid), prompts.group_size
            )
        texts = all_gather_text(json.dumps(dull), self.distributed.gather, self.engine.device)
        return [text for one in texts for text in json.loads(one)]

    def _collect(self, chosen: Chosen, watch: Stopwatch) -> list[Collected]:
        """One batch for every image size."""
        train = self.recipe.train
        ratios = self.learner.objective.needs.noise
        batches = []
        for size, positions in groups_by_size(train, iteration=self.iteration).items():
            shard = shard_prompts(
                len(positions),
                parts=train.optimizer_steps_per_iteration,
                rank=self.distributed.rank,
                world_size=self.distributed.world_size,
            )
            own_positions = [positions[i] for i in shard]
            prompts = as_prompts([chosen.prompts[i] for i in own_positions], group_size=train.group_size)
            prompts = attrs.evolve(prompts, draws=tuple(chosen.places[i] for i in own_positions))
            with self.learner.sets.use(self.learner.objective.rollout_weights), self._merged(not ratios):
                batches.append(self.engine.collect(prompts, iteration=self.iteration, watch=watch, image_size=size))
        return batches

    def _merged(self, allowed: bool) -> AbstractContextManager[None]:
        """The adapter merged into the weights, where the recipe asks for it and nothing speaks against it."""
        return self.policy.merged() if allowed and self.recipe.train.merge_adapter else nullcontext()

    def _mention_uniform_prompts(self, collected: list[Collected]) -> None:
        """Say once that a prompt has no word that a map could start from."""
        texts = [text for batch in collected for text in prompts_without_core(batch)]
        if texts and self.engine.algorithm.credit.needs.captures and not self.mentioned:
            self.mentioned = True
            self.say(f"note: no core word found in {texts[0]!r}; the credit of such prompts is uniform in space")

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
        kept = "the last iteration is saved. Mend the reward, then resume with --resume latest"
        raise RunStopped(
            f"{'iteration' if phase == 'train' else 'evaluation after iteration'} {iteration}: {share:.0%} of the "
            f"rewards are invalid, more than max_invalid_share={limit:.0%}. Why: {tally}. {consequence}, and "
            + (f"{kept}." if self.iteration else "there is nothing to save yet. Mend the reward and start again.")
        )

    @torch.no_grad()
    def _drift(self, collected: list[Collected], count: int = 32) -> float:
        """mean (v - v_base)^2 on a few (rollout, step) pairs: how far the policy has moved from where it began."""
        moved = [self._moved(batch.experience, -(-count // len(collected))) for batch in collected]
        return self.distributed.mean(torch.cat(moved))

    def _moved(self, experience: Experience, count: int) -> Tensor:
        """[count] mean (v - v_base)^2."""
        rollouts = torch.arange(min(count, experience.num_rollouts), device=self.engine.device)
        pairs = experience.step_batch(rollouts, rollouts % experience.trajectory.num_steps)
        now = self.policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning)
        with self.learner.sets.use("reference"):
            base = self.policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning)
        return (now - base).pow(2).mean(dim=(1, 2, 3))

    # ------------------------------------------------------------------------------------------------- judgement

    def _evaluation_is_due(self) -> bool:
        """Before the first iteration, after the last, and every so often in between."""
        train, done = self.recipe.train, self.iteration
        regular = train.eval_every > 0 and done % train.eval_every == 0
        return train.eval_prompts > 0 and (done in (0, train.iterations) or regular)

    def _evaluation_is_missing(self) -> bool:
        """Whether the weights at hand were not judged yet, or what was said of them cannot be read any more."""
        path = evaluation_file(self.run_dir, self.iteration)
        return self.distributed.any(self.distributed.is_main and not _readable(path))

    def _held_out(self) -> list[TaskPrompt]:
        return self.recipe.task.eval_prompts(self.recipe.train.eval_prompts)

    def _evaluated(self, weights: str) -> Evaluation:
        """One of the parameter sets, judged; training does not notice."""
        train = self.recipe.train
        with self.learner.sets.use(weights), undisturbed_generators(), self._merged(True):
            return evaluate(
                self.policy,
                self.engine.algorithm.reward,
                self._held_out(),
                num_steps=train.eval_steps,
                seed=train.eval_seed,
                image_size=train.image_size,
                rollout_batch_size=train.rollout_batch_size,
                distributed=self.distributed,
                heldout=self.recipe.heldout,
                stop=lambda: self.stop.requested,
            )

    def _judge(self, *, first: bool) -> dict[str, Any]:
        """Evaluate the weights that would be shipped: the average where there is one, else the online weights."""
        watch = Stopwatch(device=self.engine.device)
        with watch("eval"):
            result = self._evaluated(self._shipped)
        tally = FailureCounts(images=len(result.valid), reasons=Counter(result.reasons))
        share = 1 - float(result.valid.float().mean())
        self._stop_if_broken(tally, share, "eval", "Nothing can be said about these weights")
        if first:
            self.base = result
        metrics = result.metrics(None if first else self.base) | {"seconds/eval": watch.seconds["eval"]}
        metrics |= {name: float(value) for name, value in health_metrics(result.images).items()}
        self._on_main(lambda: result.write(evaluation_file(self.run_dir, self.iteration)), "writing the evaluation")
        self._remember(metrics, phase="eval")
        return metrics

    def _adopt_base(self) -> None:
        """Take over how the starting weights were judged elsewhere: runs of a benchmark share their start."""
        self.base = Evaluation.read(evaluation_file(self.run_dir, 0), self._held_out())
        health = {name: float(value) for name, value in health_metrics(self.base.images).items()}
        self._remember(self.base.metrics() | health, phase="eval")

    def _find_base(self) -> None:
        """How the starting weights were judged, for a run that goes on; judged again where that cannot be read.

        Call it while the policy still carries them.
        """
        if not self.recipe.train.eval_prompts:
            return
        path, problem = evaluation_file(self.run_dir, 0), ""
        try:
            self.base = Evaluation.read(path, self._held_out())
        except UnreadableFileError as error:
            problem = str(error)
        if not self.distributed.any(bool(problem)):
            return
        self.say(f"note: {problem or path} The starting weights are judged again, so that gains can be told.")
        self.base = self._evaluated("online")
        if not _readable(path):
            base = self.base
            self._on_main(lambda: base.write(path), "writing the evaluation")

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
        self._on_main(lambda: self._log_once(metrics, phase), "writing the log")
        if phase == "train" or self.iteration == 0:
            self.say(summary_line(self.iteration, metrics))

    def _log_once(self, metrics: Mapping[str, Any], phase: str) -> None:
        # An evaluation whose file was lost is judged again after a resume, and was logged before it.
        if self.log is not None and not self.log.has(self.iteration, phase):
            self.log.log(self.iteration, metrics, phase=phase)

    def _on_main(self, write: Callable[[], object], doing: str) -> None:
        """Write on the first process; where that fails, no process goes on."""
        self.distributed.raise_on_all(lambda: write() if self.distributed.is_main else None, doing)

    def _shows_maps(self) -> bool:
        train, done = self.recipe.train, self.iteration
        return done == 1 or done == train.iterations or (train.eval_every > 0 and done % train.eval_every == 0)

    def _keep_maps(self, batches: list[Collected]) -> None:
        """Of the first size, where there are several."""
        collected = batches[0]
        if collected.experience.credit.weight.shape[2:] == (1, 1):
            return
        path = maps_file(self.run_dir, self.iteration)
        self._on_main(
            lambda: write_maps(path, **map_samples(collected, self.policy, shown=MAPS_SHOWN)), "writing the maps"
        )

    # --------------------------------------------------------------------------------------------------- survival

    def _save(self) -> None:
        """A complete checkpoint of the last finished iteration."""
        states = {
            f"{name}/{rank}": row
            for name, state in global_generators().items()
            for rank, row in enumerate(self.distributed.gather(state[None].to(self.distributed.device)).cpu())
        }
        if self.sharding is None:
            self._on_main(lambda: self._write_checkpoint(states), "writing the checkpoint")
        else:
            tensors, hyper = self._tensors()
            self.sharding.save(
                self.run_dir,
                self.iteration,
                tensors,
                shipped=self.learner.sets.use(self._shipped),
                write=lambda folder: self._write_checkpoint(states, hyper=hyper, shards=folder),
            )
        self.saved = self.iteration

    def _rescue(self, error: BaseException) -> None:
        """Save what was finished before an error. The other processes may be anywhere, so nothing waits for them."""
        if self.sharding is not None:
            self._rescue_shards(error)
            return
        if self.iteration <= self.saved or not self.distributed.is_main:
            return
        try:
            self._write_checkpoint({f"{name}/0": state for name, state in global_generators().items()})
        except Exception as second:
            error.add_note(f"iteration {self.iteration}, the last that was finished, could not be saved: {second}")
        else:
            self.saved = self.iteration
            self.say(f"saved iteration {self.iteration}, the last that was finished")

    def _rescue_shards(self, error: BaseException) -> None:
        """The same where every process has a part: possible while all of them have stopped for the same reason."""
        if self.iteration <= self.saved:
            return
        if not (told_all(error) or isinstance(error, RunStopped | UpdateRefused | OtherProcessFailed)):
            error.add_note(
                f"iteration {self.iteration} was finished and is not saved: a part of it lies with each process. Go on "
                f"with --resume from iteration {self.saved}; train.checkpoint_every says how much can be lost."
            )
            return
        try:
            self._save()
        except Exception as second:
            error.add_note(f"iteration {self.iteration}, the last that was finished, could not be saved: {second}")
        else:
            self.say(f"saved iteration {self.iteration}, the last that was finished")

    def _tensors(self) -> tuple[dict[str, Mapping[str, Tensor]], Mapping[str, Any]]:
        """Everything that learns, by file, and the settings of the optimiser."""
        moments, hyper = optimizer_tensors(self.learner.optimizer, self.policy.trainable_parameters())
        sets = {name: self.learner.sets.values(name) for name in (ONLINE, *self.learner.saved_sets)}
        return {**sets, "optimizer": moments}, hyper

    def _write_checkpoint(
        self,
        generators: Mapping[str, Tensor],
        *,
        hyper: Mapping[str, Any] | None = None,
        shards: Path | None = None,
    ) -> None:
        """
        Args:
            hyper, shards: settings of the optimiser, and the files where processes have written what learns.
        """
        if self.log is not None:
            self.log.check()
        tensors: Mapping[str, Mapping[str, Tensor]] = {}
        if hyper is None:
            tensors, hyper = self._tensors()
        state = {
            "iteration": self.iteration,
            "optimizer_step": self.learner.optimizer_step,
            "optimizer": hyper,
            "recipe": continuity(self.recipe),
            "policy": policy_identity(self.recipe),
            "rounding": rounding(self.recipe),
            "start": self.start,
            "curriculum": self.curriculum.state(),
        }
        save_checkpoint(
            self.run_dir,
            self.iteration,
            tensors={**tensors, "rng": generators},
            state=state,
            export=self._export,
            keep=self.recipe.train.keep_checkpoints,
            shards=shards,
        )

    @property
    def _shipped(self) -> str:
        """The set of weights that is judged and exported."""
        return "ema" if self.recipe.train.ema_decay is not None else ONLINE

    def _export(self, folder: Path) -> None:
        with nullcontext() if self.sharding is not None else self.learner.sets.use(self._shipped):
            self.policy.export(folder)
            write_card_of_checkpoint(folder, self.recipe, self.policy, iteration=self.iteration, run_dir=self.run_dir)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, bit for bit.

        Raises:
            CheckpointError: when it belongs to other weights or another recipe, or is not whole.
        """
        state = check_state(checkpoint)
        check_recipe(checkpoint, self.recipe, self.start)
        names = ["online", *self.learner.saved_sets]
        for name in names:
            check_shapes(checkpoint, name, self.policy)
        if line := changed_rounding(state, self.recipe):
            self.say(line)
        self._find_base()
        for name in names:
            self.learner.sets.load(name, checkpoint.tensors[name])
        parameters = self.policy.trainable_parameters()
        restore_optimizer(self.learner.optimizer, parameters, checkpoint.tensors["optimizer"], state["optimizer"])
        rank = f"/{self.distributed.rank}"
        saved = checkpoint.tensors.get("rng", {})
        restore_global_generators({k.removesuffix(rank): v for k, v in saved.items() if k.endswith(rank)})
        self.iteration = self.saved = state["iteration"]
        self.learner.optimizer_step = state["optimizer_step"]
        self.curriculum.restore(state.get("curriculum", {}))


def _readable(path: Path) -> bool:
    try:
        read_evaluation(path)
    except UnreadableFileError:
        return False
    return True


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
    return [text for text, phrases in zip(collected.prompts.texts, spans, strict=False) if not phrases]
