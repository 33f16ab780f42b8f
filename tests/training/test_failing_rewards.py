"""A reward that fails never becomes a bad image: not in training, not in an evaluation, not on one process of two."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from benchmarks.compatibility_matrix import Judged, credits, objectives
from rlt2i.algorithm import Algorithm
from rlt2i.credit.algebra import Product
from rlt2i.credit.gdpo import GDPO
from rlt2i.interfaces import CreditAssigner, Objective, Reward, RewardBatch, RewardOutput
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.recipes import Recipe
from rlt2i.runs.metrics import read_metrics
from rlt2i.samplers.sde import SDE
from rlt2i.training.start import train
from rlt2i.training.trainer import RunStopped
from tests.helpers import toy_recipe
from tests.helpers.build import UNIFORM, collect, gradients, toy_engine, toy_learner
from tests.helpers.toy import QuadrantBrightness, ToySpec

ROOT = Path(__file__).parents[2]
Act = Callable[[RewardBatch, RewardOutput], Any]


@attrs.frozen(kw_only=True)
class Faulty(QuadrantBrightness):
    """Right until the rollout batch number `after`; from then on whatever `fault` says. Evaluations stay right."""

    fault: str
    after: int = 1

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = super().score(batch, want)
        if batch.ids is None or int(str(batch.ids[0]).split("/")[2]) < 4 * self.after:
            return output
        return FAULTS[self.fault][0](batch, output)  # type: ignore[no-any-return]


def lost(batch: RewardBatch, output: RewardOutput) -> Any:
    raise RuntimeError("CUDA out of memory")


def shifted(amount: float) -> Act:
    return lambda batch, output: attrs.evolve(output, scores=output.scores + amount)


FAULTS: dict[str, tuple[Act, str]] = {
    "exception": (lost, r"16 x RuntimeError: CUDA out of memory \(test_failing_rewards\.py, line \d+\)"),
    "nan": (shifted(torch.nan), "16 x the score is nan"),
    "infinite": (shifted(torch.inf), "16 x the score is inf"),
    "out of span": (shifted(5.0), r"outside the documented range \[0, 1\].*and \d+ other reasons"),
    "wrong length": (
        lambda batch, output: RewardOutput(scores=output.scores[1:], valid=output.valid[1:]),
        "16 x returned 7 scores for 8 images",
    ),
    "no output": (lambda batch, output: None, "16 x returned NoneType, expected RewardOutput"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_stops_with_the_reason_and_learns_nothing_from_the_batch(tmp_path, fault):
    recipe = attrs.evolve(toy_recipe.clipped(iterations=2, eval_prompts=0), reward=Faulty(fault=fault))
    with pytest.raises(RunStopped) as stopped:
        train(recipe, tmp_path / "run")
    said = str(stopped.value)
    assert said.startswith("iteration 2: 100% of the rewards are invalid, more than max_invalid_share=25%. Why: ")
    assert said.endswith("resume with --resume latest.")
    assert re.search(FAULTS[fault][1], said), said
    (line,) = read_metrics(tmp_path / "run")  # the first update
    assert line["rewards/invalid"] == 0.0
    (failure,) = [json.loads(text) for text in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert (failure["step"], failure["phase"], failure["images"], failure["invalid"]) == (2, "train", 16, 16)
    assert sum(failure["reasons"].values()) == 16


def test_a_reward_that_is_broken_from_the_start_stops_the_first_batch(tmp_path):
    recipe = attrs.evolve(toy_recipe.clipped(eval_prompts=0), reward=Faulty(fault="exception", after=0))
    with pytest.raises(RunStopped, match=r"iteration 1: 100%.*CUDA out of memory"):
        train(recipe, tmp_path / "run")
    assert not read_metrics(tmp_path / "run")


@attrs.frozen(kw_only=True)
class NoEvaluation(QuadrantBrightness):
    """Fails for `share` of the held-out images, unless told to spare them."""

    share: float = 1.0

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = super().score(batch, want)
        count = len(output.scores)
        if batch.ids is not None or "SPARE" in os.environ:
            return output
        valid = torch.arange(count) >= round(self.share * count)
        info = [{} if ok else {"error": "the judge is asleep"} for ok in valid.tolist()]
        return attrs.evolve(output, valid=valid, info=info)


def test_an_evaluation_that_fails_stops_the_run_and_is_made_up_for(tmp_path, monkeypatch):
    recipe = attrs.evolve(toy_recipe.clipped(iterations=2), reward=NoEvaluation())
    with pytest.raises(RunStopped, match=r"evaluation after iteration 0: 100%.*6 x the judge is asleep.*these weights"):
        train(recipe, tmp_path / "run")
    monkeypatch.setenv("SPARE", "1")
    train(recipe, tmp_path / "run", resume="latest")
    assert [r["step"] for r in read_metrics(tmp_path / "run", "eval")] == [0, 2]
    # The same after an update: its line is there, and so is its evaluation after a resume.
    monkeypatch.delenv("SPARE")
    late = tmp_path / "late"
    monkeypatch.setattr(NoEvaluation, "score", asleep_from(update=2))
    with pytest.raises(RunStopped, match="evaluation after iteration 2"):
        train(recipe, late)
    assert [r["step"] for r in read_metrics(late)] == [1, 2]
    monkeypatch.undo()
    monkeypatch.setenv("SPARE", "1")
    train(recipe, late, resume="latest")
    assert [r["step"] for r in read_metrics(late, "eval")] == [0, 2]
    assert {"eval/strict_gain"} <= read_metrics(late, "eval")[-1].keys()


def asleep_from(update: int) -> Any:
    """A score that fails for the second evaluation of a run."""
    asked: list[int] = []

    def score(self: Reward, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        if batch.ids is None:
            asked.append(1)
            if len(asked) == update:
                raise RuntimeError("asleep")
        return QuadrantBrightness.score(self, batch, want)  # type: ignore[arg-type]

    return score


def test_a_few_failures_in_an_evaluation_are_left_out(tmp_path):
    train(attrs.evolve(toy_recipe.clipped(iterations=1), reward=NoEvaluation(share=1 / 6)), tmp_path / "run")
    first = read_metrics(tmp_path / "run", "eval")[0]
    assert first["eval/images"] == 5
    assert first["eval/reward"] > 0.4


def test_a_missing_package_is_no_failure_of_images(tmp_path):
    @attrs.frozen(kw_only=True)
    class NotInstalled(QuadrantBrightness):
        def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
            raise ModuleNotFoundError("No module named 'rapidocr'", name="rapidocr")

    recipe = attrs.evolve(toy_recipe.clipped(eval_prompts=0), reward=NotInstalled())
    with pytest.raises(ModuleNotFoundError, match="rapidocr"):
        train(recipe, tmp_path / "run")


# ----------------------------------------------------------------------------------------- statistics and loss

SDE_OF_THREE = SDE(num_steps=6, window=(0, 3))
OBJECTIVES = objectives()
CREDITS = {
    name: credit
    for name, credit in credits().items()
    # A tree of rollouts cannot lose a branch, and a recorded pair is not compared by its scores.
    if "edges" not in credit.needs.captures and "RecordedPreference" not in name
}


@attrs.frozen(kw_only=True)
class EighthFails(Judged):
    """Cannot judge the eighth rollout of any group; its score is what a failure looks like."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = super().score(batch, want)
        if batch.ids is None:
            return output
        fails = torch.tensor([str(name).endswith("/7") for name in batch.ids])
        return attrs.evolve(output, scores=torch.where(fails, torch.nan, output.scores), valid=~fails)


def gradient_of(credit: CreditAssigner, objective: Objective, group_size: int) -> dict[str, torch.Tensor]:
    algorithm = Algorithm(
        policy=ToySpec(), sampler=SDE_OF_THREE, reward=EighthFails(), credit=credit, objective=objective
    ).load()
    return gradients(toy_learner(algorithm), collect(toy_engine(algorithm), group_size=group_size).experience)


def assert_same_gradient(credit: CreditAssigner, objective: Objective) -> None:
    eight, seven = gradient_of(credit, objective, 8), gradient_of(credit, objective, 7)
    for name, expected in seven.items():
        assert torch.isfinite(eight[name]).all()
        torch.testing.assert_close(eight[name], expected, atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert any(value.abs().max() > 0 for value in seven.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_group_with_an_invalid_rollout_is_the_group_without_it_in_every_objective(objective):
    assert_same_gradient(UNIFORM, OBJECTIVES[objective])


# Whose map `OtherRollout` borrows depends on who else is in the group.
@pytest.mark.parametrize("credit", [name for name in CREDITS if "OtherRollout" not in name])
def test_a_group_with_an_invalid_rollout_is_the_group_without_it_in_every_credit(credit):
    assert_same_gradient(CREDITS[credit], ClippedSurrogate())


# -------------------------------------------------------------------------------------------------- several processes


@attrs.frozen(kw_only=True)
class FailsElsewhere(Judged):
    """Raises on the second process, in training and in evaluations."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        if os.environ.get("RANK") == "1":
            raise RuntimeError("no route to the judge")
        return super().score(batch, want)


def one_rank() -> Recipe:
    """Half of the rewards fail, on one process: too many."""
    return attrs.evolve(toy_recipe.clipped(iterations=2), reward=FailsElsewhere())


def one_rank_tolerated() -> Recipe:
    """The same, and the user does not mind; the credit reads components, which the failing process does not have."""
    credit = Product(advantage=GDPO(weights={"inside": 1.0, "outside": 0.5}))
    return attrs.evolve(toy_recipe.clipped(iterations=2, max_invalid_share=0.6), reward=FailsElsewhere(), credit=credit)


def launch(recipe: str, run: Path) -> subprocess.CompletedProcess[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlt2i", "train"]
    return subprocess.run(
        [sys.executable, *words, f"tests.training.test_failing_rewards:{recipe}", "--run-dir", str(run)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_all_processes_stop_with_the_reason_of_the_one_that_failed(tmp_path):
    ran = launch("one_rank", tmp_path / "run")
    assert ran.returncode != 0
    # Both say it, the healthy one too.
    assert ran.stderr.count("50% of the rewards are invalid") == 2, ran.stderr[-3000:]
    assert ran.stderr.count("Why: 3 x RuntimeError: no route to the judge") == 2
    (failure,) = [json.loads(text) for text in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert (failure["phase"], failure["images"], failure["invalid"]) == ("eval", 6, 3)


def test_a_process_without_scores_neither_hangs_nor_spoils_the_others(tmp_path):
    ran = launch("one_rank_tolerated", tmp_path / "run")
    assert ran.returncode == 0, ran.stderr[-3000:]
    for line in read_metrics(tmp_path / "run"):
        assert line["rewards/invalid"] == 0.5
        assert line["reward/mean"] > 0.4
        assert line["reward/inside"] > 0.4
        assert line["grad_norm"] > 0
    assert read_metrics(tmp_path / "run", "eval")[-1]["eval/images"] == 3
