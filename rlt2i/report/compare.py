"""Several runs side by side: final and mean held-out scores, paired over seeds, and what may be said of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import attrs
from scipy.special import stdtrit

from rlt2i.inputs.display import cell, visible
from rlt2i.report.charts import Series, line_chart
from rlt2i.report.numbers import count, signed
from rlt2i.report.rundir import Run, column, read_run
from rlt2i.runs.directory import INPUTS
from rlt2i.runs.identity import read_inputs


@attrs.frozen(kw_only=True)
class Outcome:
    """One run.

    Attributes:
        arm, seed, run: which; `run` is the directory's name.
        iteration: the one at which `final` was measured, common to all runs.
        base, final: the metric at the first and the last common evaluation.
        mean: the area under the curve between them, divided by its length.
        objects: mean objects at `iteration`; nan when not logged.
        completed: the iteration of the run's own last evaluation.
    """

    arm: str
    seed: int
    run: str
    iteration: int
    base: float
    final: float
    mean: float
    objects: float
    completed: int


@attrs.frozen(kw_only=True)
class Difference:
    """An arm against the baseline over the seeds that both ran.

    Attributes:
        arm, measure: which ("final" or "mean").
        values: per seed, arm minus baseline.
    """

    arm: str
    measure: str
    values: Sequence[float]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def standard_error(self) -> float:
        """Over seeds; nan with fewer than two."""
        n = len(self.values)
        if n < 2:
            return math.nan
        return math.sqrt(sum((v - self.mean) ** 2 for v in self.values) / (n - 1) / n)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % by Student's t, which is wide for few seeds, as it should be."""
        n = len(self.values)
        reach = self.standard_error * (float(stdtrit(n - 1, 0.975)) if n > 1 else math.nan)
        return self.mean - reach, self.mean + reach

    @property
    def distinguishable(self) -> bool:
        """At least two standard errors from zero, and not exactly zero."""
        return abs(self.mean) >= 2 * self.standard_error and self.mean != 0

    def sentence(self, baseline: str) -> str:
        n = len(self.values)
        what = "final score" if self.measure == "final" else "mean score over training"
        if n < 2:
            return (
                f"{self.arm}: {what} {signed(self.mean, 3)} against {baseline} on one shared seed; "
                "one seed gives no standard error, so nothing can be claimed."
            )
        size = f"{what} {signed(self.mean, 3)} (SE {self.standard_error:.3f}, {n} paired seeds)"
        if not self.distinguishable:
            return f"{self.arm}: {size}: not distinguishable from {baseline}."
        direction = "above" if self.mean > 0 else "below"
        low, high = self.interval
        bounds = f"[{signed(low, 3)}, {signed(high, 3)}]"
        if low <= 0 <= high:
            return (
                f"{self.arm}: {size}: {direction} {baseline} by two standard errors or more, but with {n} "
                f"seeds the 95 % t interval {bounds} still includes zero. Suggestive, no more."
            )
        return f"{self.arm}: {size}: {direction} {baseline}, 95 % t interval {bounds}."


@attrs.frozen(kw_only=True)
class Comparison:
    """What `compare_runs` found; also written to `csv`, `svg` and `text`."""

    outcomes: Sequence[Outcome]
    differences: Sequence[Difference]
    sentence: str
    csv: Path
    svg: Path
    text: Path


def _refuse_repeats(runs: Mapping[str, Sequence[Path]]) -> None:
    """A directory counts once: twice in an arm it would narrow the interval, in two arms compare a run with itself."""
    arms: dict[Path, str] = {}
    for arm, paths in runs.items():
        for path in paths:
            there = Path(path).resolve()
            if there in arms:
                twice = f"twice in {arm!r}" if arms[there] == arm else f"in {arms[there]!r} and in {arm!r}"
                raise ValueError(f"compare_runs: {path} is {twice}. Name every run once.")
            arms[there] = arm


def compare_runs(
    runs: Mapping[str, Sequence[Path]], out: Path, *, baseline: str = "uniform", metric: str = "eval/strict"
) -> Comparison:
    """Compare arms at equal numbers of iterations.

    Args:
        runs: arm -> run directories, one per seed. Seeds are read from the recipes, and paired between arms.
        out: folder for comparison.csv, comparison.svg and comparison.md.
        baseline: the arm that the others are compared with.
        metric: a held-out metric.

    Raises:
        ValueError: no such baseline, a run without this metric, two runs of an arm with one seed, or runs
            that share fewer than two evaluated iterations.
    """
    if baseline not in runs:
        raise ValueError(f"compare_runs(baseline={baseline!r}): not among the arms {sorted(runs)}. Name one of them.")
    _refuse_repeats(runs)
    opened = {arm: _by_seed(arm, [read_run(path) for path in paths]) for arm, paths in runs.items()}
    curves = {(arm, seed): _curve(run, metric) for arm, seeds in opened.items() for seed, run in seeds.items()}
    common = sorted(set.intersection(*(set(points) for points in curves.values())))
    if len(common) < 2:
        raise ValueError(
            f"compare_runs: the runs share {len(common)} iterations at which {metric} was evaluated, at least "
            "2 are needed. Evaluate all runs at the same iterations."
        )
    outcomes = [
        _outcome(arm, seed, run, curves[arm, seed], common)
        for arm, seeds in opened.items()
        for seed, run in sorted(seeds.items())
    ]
    differences = _differences(outcomes, baseline)
    lines = [_sentence(outcomes, differences, baseline, metric, common[-1]), *_other_data(opened)]
    sentence = visible("\n".join(lines))
    out.mkdir(parents=True, exist_ok=True)
    made = Comparison(
        outcomes=outcomes,
        differences=differences,
        sentence=sentence,
        csv=out / "comparison.csv",
        svg=out / "comparison.svg",
        text=out / "comparison.md",
    )
    made.csv.write_text(_csv(outcomes), encoding="utf-8")
    made.svg.write_text(_plot(curves, metric, common), encoding="utf-8")
    made.text.write_text(visible(_markdown(made, metric)), encoding="utf-8")
    return made


def _other_data(opened: Mapping[str, Mapping[int, Run]]) -> list[str]:
    """What the runs read under one name with different content."""
    read: dict[str, dict[str, list[str]]] = {}
    for seeds in opened.values():
        for run in seeds.values():
            for name, entry in (read_inputs(run.path / INPUTS) or {}).items():
                read.setdefault(name, {}).setdefault(entry["sha256"], []).append(run.path.name)
    lines = []
    for name, versions in read.items():
        if len(versions) > 1:
            who = "; ".join(", ".join(names) for names in versions.values())
            lines.append(
                f"Not the same data: {name} had {len(versions)} different contents ({who}). A difference between these "
                "runs may be one of the data."
            )
    return lines


def _by_seed(arm: str, runs: Sequence[Run]) -> dict[int, Run]:
    if not runs:
        raise ValueError(f"compare_runs: arm {arm!r} has no run.")
    runs_by_seed: dict[int, Run] = {}
    for place, run in enumerate(runs):
        train = run.recipe.get("train")
        seed = (train if isinstance(train, dict) else run.recipe).get("seed")
        seed = seed if isinstance(seed, int) else place
        if seed in runs_by_seed:
            raise ValueError(
                f"compare_runs: {runs_by_seed[seed].path.name} and {run.path.name} of arm {arm!r} both have seed "
                f"{seed}; a seed counts once."
            )
        runs_by_seed[seed] = run
    return runs_by_seed


def _curve(run: Run, metric: str) -> dict[int, float]:
    x, y = column(run.evals, metric)
    points = {int(step): value for step, value in zip(x, y, strict=True) if math.isfinite(value)}
    if not points:
        raise ValueError(f"compare_runs: {run.path} has no {metric}. Evaluate it first: rlt2i eval {run.path}")
    return points


def _outcome(arm: str, seed: int, run: Run, points: Mapping[int, float], common: Sequence[int]) -> Outcome:
    area = sum((points[a] + points[b]) / 2 * (b - a) for a, b in pairwise(common))
    x, objects = column(run.evals, "eval/objects")
    return Outcome(
        arm=arm,
        seed=seed,
        run=run.path.name,
        iteration=common[-1],
        base=points[common[0]],
        final=points[common[-1]],
        mean=area / (common[-1] - common[0]),
        objects=dict(zip(x, objects, strict=True)).get(common[-1], math.nan),
        completed=max(points),
    )


def _differences(outcomes: Sequence[Outcome], baseline: str) -> list[Difference]:
    reference = {o.seed: o for o in outcomes if o.arm == baseline}
    differences = []
    for arm in dict.fromkeys(o.arm for o in outcomes):
        shared = [o for o in outcomes if o.arm == arm and o.seed in reference]
        if arm == baseline or not shared:
            continue
        for measure in ("final", "mean"):
            values = [getattr(o, measure) - getattr(reference[o.seed], measure) for o in shared]
            differences.append(Difference(arm=arm, measure=measure, values=values))
    return differences


def _sentence(
    outcomes: Sequence[Outcome], differences: Sequence[Difference], baseline: str, metric: str, iteration: int
) -> str:
    lines = [f"{metric} at iteration {iteration}, the last that every run evaluated; differences are paired by seed."]
    lines += [d.sentence(baseline) for d in differences]
    compared = {d.arm for d in differences}
    alone = [arm for arm in dict.fromkeys(o.arm for o in outcomes) if arm not in compared and arm != baseline]
    if alone:
        lines.append(f"No seed in common with {baseline}, hence no comparison: {', '.join(alone)}.")
    if len(differences) > 2:
        lines.append(
            f"{len(differences)} comparisons were made; about one in twenty exceeds two standard errors by "
            "chance even with many seeds, and more often with few."
        )
    oracle = next((d for d in differences if d.arm == "oracle" and d.measure == "final"), None)
    if oracle is not None and not (oracle.distinguishable and oracle.mean > 0):
        lines.append(
            f"The oracle does not beat {baseline} here, so this benchmark, as run, cannot rank spatial credit."
        )
    late = [o.run for o in outcomes if o.completed > iteration]
    if late:
        lines.append(f"Not used: evaluations after iteration {iteration} of {', '.join(late)}.")
    return "\n".join(lines)


def _csv(outcomes: Sequence[Outcome]) -> str:
    buffer = io.StringIO()
    names = [field.name for field in attrs.fields(Outcome)]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for outcome in outcomes:
        values = [getattr(outcome, name) for name in names]
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else cell(v) for v in values])
    return buffer.getvalue()


def _plot(curves: Mapping[tuple[str, int], Mapping[int, float]], metric: str, common: Sequence[int]) -> str:
    arms = list(dict.fromkeys(arm for arm, _ in curves))
    thin = [
        Series(
            label=f"{arm}, seed {seed}",
            x=common,
            y=[points[x] for x in common],
            colour=arms.index(arm),
            faint=True,
        )
        for (arm, seed), points in curves.items()
    ]
    bold = []
    for i, arm in enumerate(arms):
        members = [points for (name, _), points in curves.items() if name == arm]
        means = [sum(points[x] for points in members) / len(members) for x in common]
        bold.append(Series(label=f"{arm} ({count(len(members), 'seed')})", x=common, y=means, colour=i))
    return line_chart(
        [*thin, *bold],
        title="Mean over seeds (bold) and each seed (thin)",
        y_label=metric,
        width=760,
        height=400,
        standalone=True,
    )


def _markdown(made: Comparison, metric: str) -> str:
    arms = dict.fromkeys(o.arm for o in made.outcomes)
    rows = []
    for arm in arms:
        members = [o for o in made.outcomes if o.arm == arm]
        base, final, mean = (sum(getattr(o, k) for o in members) / len(members) for k in ("base", "final", "mean"))
        rows.append(f"| {arm} | {len(members)} | {base:.3f} | {final:.3f} | {mean:.3f} |")
    head = [f"| arm | seeds | {metric} before | final | mean over training |", "|---|---|---|---|---|"]
    listed = "\n".join(f"- {line}" for line in made.sentence.splitlines())
    return "\n".join(["# Comparison", "", *head, *rows, "", listed, "", f"![curves]({made.svg.name})", ""])
