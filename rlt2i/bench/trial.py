"""One trial: an arm at a seed, in a process of its own. Trains (or goes on), judges, writes its tables.

python -m rlt2i.bench.trial FOLDER ARM SEED
python -m rlt2i.bench.trial FOLDER --base
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rlt2i.bench.divergence import IMAGES, inside_and_outside, path_divergence
from rlt2i.bench.folder import BenchFolder, csv_text, finish
from rlt2i.bench.measures import evaluation_measures, judged_places
from rlt2i.evaluation.heldout import Evaluation, evaluate
from rlt2i.interfaces import Policy
from rlt2i.parameter_sets import ParameterSets
from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.artifacts import evaluation_file
from rlt2i.runs.checkpoint import latest_checkpoint, load_checkpoint
from rlt2i.runs.files import advice
from rlt2i.runs.metrics import read_metrics
from rlt2i.training.start import train as train_recipe

STOPPED = 75
"""Exit status of a trial that was asked to stop and can go on (EX_TEMPFAIL)."""

SCORES = ("arm", "seed", "iteration", "category", "prompt", "images", "metric", "value")
VALUES = ("arm", "seed", "iteration", "samples", "metric", "value")
NOT_KEPT = ("eval/", "health/", "beside_seconds/")
"""Training metrics that stand in a table of their own, or overlap with the seconds of a phase."""
TIMING = ("arm", "seed", "iteration", "phase", "seconds")


def run_trial(folder: BenchFolder, arm: str, seed: int) -> int:
    """Bring one trial to its end; 0 when it is there, `STOPPED` when it was interrupted and saved."""
    place, recipe, plan = folder.trial(arm, seed), folder.recipe(arm, seed), folder.plan()
    if folder.finished(arm, seed):
        return 0
    run = place / "run"
    resume = "latest" if (run / "recipe.yaml").is_file() and latest_checkpoint(run) else None
    if resume is None:  # killed before its first checkpoint: there is nothing to go on from
        shutil.rmtree(run, ignore_errors=True)
        (run / "images").mkdir(parents=True)
        shutil.copyfile(folder.base, run / "images" / folder.base.name)
    train_recipe(recipe, run, resume=resume)
    last = recipe.train.iterations
    if not evaluation_file(run, last).is_file():
        return STOPPED
    tables = trial_tables(recipe, arm, run, moved=distance_moved(recipe, run))
    finish(place, tables, {"arm": arm, "seed": seed, "recipe": recipe.hash, "iterations": last})
    if not plan.keep_runs:
        shutil.rmtree(run)
    return 0


def judge_base(folder: BenchFolder) -> None:
    """Evaluate the policy that all arms start from, exactly as a run would, once for all of them."""
    plan = folder.plan()
    recipe = folder.recipe(plan.reference, plan.first_seed)
    train, algorithm = recipe.train, recipe.algorithm().load()
    result = evaluate(
        algorithm.policy,  # type: ignore[arg-type]  # loaded
        algorithm.reward,
        recipe.task.eval_prompts(train.eval_prompts),
        num_steps=train.eval_steps,
        seed=train.eval_seed,
        image_size=train.image_size,
        rollout_batch_size=train.rollout_batch_size,
        heldout=recipe.heldout,
    )
    result.write(folder.base)


def distance_moved(recipe: Recipe, run: Path) -> dict[str, float]:
    """Nats between the paths of the trained policy and of the base, on the first held-out prompts.

    Args:
        run: a finished run; its newest checkpoint is read.
    """
    train, newest = recipe.train, latest_checkpoint(run)
    assert newest is not None, f"{run}: a finished run has a checkpoint"
    policy = recipe.algorithm().load().policy
    assert isinstance(policy, Policy)
    parameters = policy.trainable_parameters()
    sets = ParameterSets(parameters)
    sets.add("reference")
    saved = load_checkpoint(newest).tensors["online"]
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    base = Evaluation.read(evaluation_file(run, 0), recipe.task.eval_prompts(train.eval_prompts)).unseen()
    nats = path_divergence(
        policy,
        sets,
        base.prompts[:IMAGES],
        num_steps=train.eval_steps,
        seed=train.eval_seed,
        image_size=train.image_size,
        rollout_batch_size=train.rollout_batch_size,
    )
    looks = "maps" in recipe.reward.offers
    return inside_and_outside(nats, judged_places(base, recipe.reward)[: len(nats)] if looks else None)


# ---------------------------------------------------------------------------------------------------------- tables


def trial_tables(recipe: Recipe, arm: str, run: Path, *, moved: Mapping[str, float]) -> dict[str, str]:
    """The tables of a finished run, name -> CSV.

    Args:
        moved: further measures of the trained policy, see `distance_moved`.
    """
    seed, train = recipe.train.seed, recipe.train
    per_iteration = train.prompts_per_iteration * train.group_size
    prompts = recipe.task.eval_prompts(train.eval_prompts)
    scores: list[tuple[Any, ...]] = []
    evaluations: list[tuple[Any, ...]] = []
    base: Evaluation | None = None
    for iteration in range(train.iterations + 1):
        if not evaluation_file(run, iteration).is_file():
            continue
        now = Evaluation.read(evaluation_file(run, iteration), prompts).unseen()
        base = base or now
        scores += [(arm, seed, iteration, *row) for row in prompt_scores(now)]
        measured = evaluation_measures(now, base, recipe.reward)
        if iteration == train.iterations:
            measured |= moved
        evaluations += [(arm, seed, iteration, iteration * per_iteration, k, v) for k, v in measured.items()]
    training: list[tuple[Any, ...]] = []
    timing: list[tuple[Any, ...]] = []
    for record in read_metrics(run, "train"):
        iteration = record["step"]
        for name, value in record.items():
            if name.startswith("seconds/"):
                timing.append((arm, seed, iteration, name.removeprefix("seconds/"), float(value)))
            elif isinstance(value, int | float) and name != "step" and not name.startswith(NOT_KEPT):
                training.append((arm, seed, iteration, iteration * per_iteration, name, float(value)))
    return {
        "scores": csv_text(SCORES, scores),
        "evaluations": csv_text(VALUES, evaluations),
        "training": csv_text(VALUES, training),
        "timing": csv_text(TIMING, timing),
    }


def prompt_scores(now: Evaluation) -> Iterator[tuple[str, int, int, str, float]]:
    """(category, prompt, images, metric, mean) of every held-out prompt; what a bootstrap over prompts needs.

    Prompts with the same text are one; they are numbered in order of first appearance. Invalid images are left out.
    """
    rows: dict[str, list[int]] = {}
    for row, (prompt, valid) in enumerate(zip(now.prompts, now.valid.tolist(), strict=True)):
        rows.setdefault(prompt.text, []).extend([row] if valid else [])
    for number, members in enumerate(rows.values()):
        for name in ("reward", *now.components):
            values = [v for v in now.values(name)[members].tolist() if math.isfinite(v)]
            if values:
                yield now.prompts[members[0]].category, number, len(values), name, sum(values) / len(values)


# --------------------------------------------------------------------------------------------------------- process


def command(folder: BenchFolder, *words: str) -> list[str]:
    """The command line of a process of this module."""
    return [sys.executable, "-m", "rlt2i.bench.trial", str(folder.path), *words]


def environment(threads: int) -> Mapping[str, str]:
    """Fixed thread counts: sums over other numbers of threads differ in the last bit."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONUNBUFFERED": "1"}


def _end_with_parent() -> None:
    """Leave when the process that started this one is gone, however it went: its end of the pipe closes then."""

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin: its lock, held by a daemon thread, would abort the interpreter's exit
        os._exit(STOPPED)

    threading.Thread(target=wait, daemon=True).start()


def main(words: list[str]) -> int:
    """What the process does; the exit status."""
    _end_with_parent()
    folder = BenchFolder(path=Path(words[0]))
    torch.set_num_threads(folder.plan().threads)
    try:
        if words[1] == "--base":
            judge_base(folder)
            return 0
        return run_trial(folder, words[1], int(words[2]))
    except OSError as error:
        print(f"{error}. {advice(error, folder.path)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
