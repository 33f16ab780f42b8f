"""From the tables of a benchmark to comparisons, verdicts and a sentence that claims only what the numbers carry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch

from rlt2i.bench import derived
from rlt2i.bench.curves import Curve, Trial, area, at, until
from rlt2i.bench.folder import read_table
from rlt2i.bench.plan import Plan
from rlt2i.bench.statistics import FEWEST_SEEDS, Judged, Paired, detectable, judge, paired, seeds_needed, slope
from rlt2i.evaluation.statistics import Interval, clustered_mean
from rlt2i.recipes.recipe import Recipe
from rlt2i.training.dry_run import batch_plan

MEASURES = {
    "final": "score after the last iteration",
    "area": "mean score over training (area under the curve)",
    "equal compute": "score at equal numbers of network evaluations (a backward pass counts as two)",
    "area, equal compute": "mean score up to that number of network evaluations",
}
"""What is compared, in the unit of the plan's metric."""

SECONDARY = (
    "reward",
    "heldout",
    "drift/inside",
    "drift/outside",
    "selectivity",
    "edges/outside",
    "diversity/cosine_distance",
    "diversity/vendi",
    "kl/",
    *derived.MEANINGS,
)
"""Measures after the last iteration that are compared without a margin, where they were recorded."""


@attrs.frozen(kw_only=True)
class Comparison:
    """One arm with another, in one measure.

    Attributes:
        measure: of `MEASURES`, or the name of a held-out measure.
        arm, other: which two.
        judged: over seeds.
        prompts: the mean difference with an interval from a bootstrap over prompts, these seeds given; None where it
            was not computed.
    """

    measure: str
    arm: str
    other: str
    judged: Judged
    prompts: Interval | None = None


@attrs.frozen(kw_only=True)
class Results:
    """What the tables of a benchmark hold.

    Attributes:
        plan: that was run.
        curves: metric -> (arm, seed) -> iteration -> value, on the iterations that all trials evaluated.
        seconds: (arm, seed) -> mean seconds of an iteration, evaluation left out.
        credit_seconds: (arm, seed) -> those of them in which credit was assigned.
        cost: arm -> network evaluations of an iteration, see `network_evaluations`.
        samples: iteration -> images trained on.
        scores: (arm, seed) -> prompt -> (images, mean), of the plan's metric after the last iteration.
    """

    plan: Plan
    curves: Mapping[str, Mapping[Trial, Curve]]
    seconds: Mapping[Trial, float]
    credit_seconds: Mapping[Trial, float]
    cost: Mapping[str, int]
    samples: Mapping[int, int]
    scores: Mapping[Trial, Mapping[int, tuple[int, float]]]

    @property
    def main(self) -> Mapping[Trial, Curve]:
        """The curves of the plan's metric."""
        return self.curves[self.plan.metric]

    @property
    def last(self) -> int:
        return max(self.samples)

    def seeds(self, arm: str) -> list[int]:
        return [seed for name, seed in self.main if name == arm]


def read_results(path: Path, plan: Plan) -> Results:
    """The tables in a folder.

    Raises:
        ValueError: when there are none, or they do not hold the plan's metric.
    """
    if not (path / "evaluations.csv").is_file():
        raise ValueError(
            f"{path}: no results are there. Run `rlt2i bench {plan.name}` first, or name their folder with --out."
        )
    curves: dict[str, dict[Trial, dict[int, float]]] = {}
    samples: dict[int, int] = {}
    for row in read_table(path / "evaluations.csv"):
        trial, iteration = (row["arm"], int(row["seed"])), int(row["iteration"])
        samples[iteration] = int(row["samples"])
        curves.setdefault(row["metric"], {}).setdefault(trial, {})[iteration] = float(row["value"])
    if plan.metric not in curves:
        raise ValueError(f"{path}: no metric {plan.metric!r} was recorded. There are: {', '.join(curves)}.")
    training = _training(path / "training.csv")
    curves |= derived.measures(curves, training, metric=plan.metric, last=max(samples))
    last, scores = max(samples), {}  # type: tuple[int, dict[Trial, dict[int, tuple[int, float]]]]
    for row in read_table(path / "scores.csv"):
        if row["metric"] == plan.metric and int(row["iteration"]) == last:
            prompts = scores.setdefault((row["arm"], int(row["seed"])), {})
            prompts[int(row["prompt"])] = (int(row["images"]), float(row["value"]))
    seconds: dict[Trial, float] = {}
    assigning: dict[Trial, float] = {}
    for row in read_table(path / "timing.csv"):
        for kept in (seconds, assigning) if row["phase"] == "credit" else (seconds,) if row["phase"] != "eval" else ():
            trial = (row["arm"], int(row["seed"]))
            kept[trial] = kept.get(trial, 0.0) + float(row["seconds"]) / last
    return Results(
        plan=plan,
        curves=curves,
        seconds=seconds,
        credit_seconds=assigning,
        cost={arm: network_evaluations(plan.recipe(arm)) for arm in plan.arms},
        samples=samples,
        scores=scores,
    )


def _training(path: Path) -> dict[str, dict[Trial, dict[int, float]]]:
    """metric -> trial -> iteration -> value of the training log, where there is one."""
    curves: dict[str, dict[Trial, dict[int, float]]] = {}
    for row in read_table(path) if path.is_file() else ():
        trial = (row["arm"], int(row["seed"]))
        curves.setdefault(row["metric"], {}).setdefault(trial, {})[int(row["iteration"])] = float(row["value"])
    return curves


def network_evaluations(recipe: Recipe) -> int:
    """Of one iteration, counted in states shown to the network; a backward pass counts as two.

    Rollouts x steps to sample, and for each trained (rollout, step) pair one forward pass, one backward pass, and one
    more forward pass per further set of weights ("old", "reference") that the objective asks. Completions that some
    credits ask for, decoding and rewards are not network evaluations and not counted.
    """
    batch = batch_plan(recipe, world_size=1)
    sets = len(recipe.objective.needs.parameter_sets)
    return batch.rollouts * (batch.num_steps + batch.trained_steps * (3 + sets))


# ------------------------------------------------------------------------------------------------------ comparisons


def differences(results: Results, measure: str, arm: str, other: str) -> dict[int, float]:
    """Seed -> arm minus other, over the seeds that both ran."""
    curves = results.curves.get(measure, results.main)
    shared = [seed for name, seed in curves if name == arm and (other, seed) in curves]
    budget = min(results.cost[arm], results.cost[other]) * results.last  # what the cheaper has spent at the end
    if measure == "equal compute":
        value = lambda name, seed: at(curves[name, seed], budget / results.cost[name])
    elif measure == "area, equal compute":
        value = lambda name, seed: area(until(curves[name, seed], budget / results.cost[name]))
    elif measure == "area":
        value = lambda name, seed: area(curves[name, seed])
    else:
        value = lambda name, seed: curves[name, seed][results.last]
    return {seed: value(arm, seed) - value(other, seed) for seed in sorted(shared)}


def compare(results: Results) -> list[Comparison]:
    """All comparisons of the plan in every measure; Holm's correction is over the comparisons of one measure."""
    plan, comparisons = results.plan, []
    secondary = [name for name in results.curves if name != plan.metric and name.startswith(SECONDARY)]
    for measure in (*MEASURES, *secondary):
        values = {pair: differences(results, measure, *pair) for pair in plan.comparisons}
        values = {pair: by_seed for pair, by_seed in values.items() if by_seed}
        margin = plan.margin if measure in MEASURES else None
        judged = judge({"/".join(p): list(v.values()) for p, v in values.items()}, margin=margin, alpha=plan.alpha)
        for arm, other in values:
            prompts = over_prompts(results, arm, other) if measure == "final" else None
            comparisons.append(
                Comparison(measure=measure, arm=arm, other=other, judged=judged[f"{arm}/{other}"], prompts=prompts)
            )
    return comparisons


def trend(results: Results, measure: str = "final") -> Paired | None:
    """The slope of a measure over the plan's trend, over seeds; None where no seed has run all of its arms.

    A line is fitted through the arms of each seed, so what a seed adds to all of them cancels. It is one test of its
    own with the plan's alpha, and no part of the correction over comparisons.

    Args:
        measure: "final" or "area".
    """
    plan = results.plan
    if plan.trend is None:
        return None
    levels = plan.trend.levels
    whole = set.intersection(*(set(results.seeds(arm)) for arm in levels))
    value = {"final": lambda curve: curve[results.last], "area": area}[measure]
    slopes = [
        slope(list(levels.values()), [value(results.main[arm, seed]) for arm in levels]) for seed in sorted(whole)
    ]
    return paired(slopes, confidence=1 - plan.alpha) if slopes else None


def over_prompts(results: Results, arm: str, other: str) -> Interval | None:
    """The mean difference after the last iteration, with a bootstrap over prompts; seeds are as they are.

    A prompt's difference is the mean over seeds, since all of them are judged on the same prompts and noise.
    """
    shared = [seed for name, seed in results.scores if name == arm and (other, seed) in results.scores]
    if not shared:
        return None
    values, clusters = [], []
    for prompt, (images, _) in results.scores[arm, shared[0]].items():
        pairs = [(results.scores[arm, s].get(prompt), results.scores[other, s].get(prompt)) for s in shared]
        both = [a[1] - b[1] for a, b in pairs if a is not None and b is not None]
        if both:
            values += [_mean(both)] * images
            clusters += [prompt] * images
    return clustered_mean(torch.tensor(values), clusters, seed=0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --------------------------------------------------------------------------------------------------------- writing


def sentence(results: Results, comparisons: Sequence[Comparison]) -> str:
    """What may be said, a line per comparison of the final score, then the limits."""
    plan = results.plan
    tested = sum(c.measure == "final" and c.judged.difference.seeds >= FEWEST_SEEDS for c in comparisons)
    corrected = (
        f"p values are Holm-adjusted over {tested} comparison{'s' * (tested != 1)}, equivalent means within "
        f"{plan.margin:g}."
    )
    lines = [
        f"{plan.metric} on held-out prompts after iteration {results.last}; differences are paired by seed, "
        + (corrected if tested else f"and below {FEWEST_SEEDS} seeds there is no verdict.")
    ]
    lines += [_line(plan, c) for c in comparisons if c.measure == "final"]
    return "\n".join([*lines, *trend_lines(results), *remarks(results, comparisons)])


def trend_lines(results: Results) -> list[str]:
    """What the plan's trend came to, after the last iteration and over training."""
    plan, lines = results.plan, []
    for measure, when in (("final", f"after iteration {results.last}"), ("area", "on average over training")):
        if (d := trend(results, measure)) is None or plan.trend is None:
            continue
        low, high = min(plan.trend.levels.values()), max(plan.trend.levels.values())
        span = high - low
        line = f"{plan.metric} {when}, from {low:g} to {high:g} of {plan.trend.over}: {span * d.mean:+.3f}"
        if d.seeds < FEWEST_SEEDS:
            lines.append(f"{line}; {d.seeds} seed{'s' * (d.seeds > 1)}, too few to claim anything.")
            continue
        verdict = ("rises" if d.mean > 0 else "falls") if d.p < plan.alpha else "no trend shown"
        interval = f"[{span * d.low:+.3f}, {span * d.high:+.3f}]"
        lines.append(f"{line} {interval} along a line through these arms, {d.seeds} seeds: {verdict} (p = {d.p:.2g}).")
    return lines


def remarks(results: Results, comparisons: Sequence[Comparison]) -> list[str]:
    """What limits the comparisons as a whole: an oracle without a lead, and arms that have not run."""
    plan, lines = results.plan, []
    oracle = next((c for c in comparisons if (c.measure, c.arm, c.other) == ("final", "oracle", plan.reference)), None)
    if oracle and oracle.judged.difference.seeds >= FEWEST_SEEDS and oracle.judged.verdict != "better":
        ranked = any(c.measure == "final" and c.judged.verdict in ("better", "worse") for c in comparisons)
        lines.append(
            f"The oracle is not shown to be better than {plan.label(plan.reference)}"
            + ("." if ranked else ": as run, this benchmark cannot rank spatial credit.")
        )
    if missing := [arm for arm in plan.arms if not results.seeds(arm)]:
        lines.append(f"Not run yet: {', '.join(missing)}.")
    return lines


def _line(plan: Plan, comparison: Comparison) -> str:
    d, verdict = comparison.judged.difference, comparison.judged.verdict
    names = f"{plan.label(comparison.arm)} against {plan.label(comparison.other)}"
    if d.seeds < FEWEST_SEEDS:
        prompts = comparison.prompts
        within = f", [{prompts.low:+.3f}, {prompts.high:+.3f}] over prompts" if prompts else ""
        return f"{names}: {d.mean:+.3f}{within}; {d.seeds} seed{'s' * (d.seeds > 1)}, too few to claim anything."
    size = f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}], {d.seeds} seeds"
    words = {
        "better": f"better (p = {comparison.judged.p:.2g})",
        "worse": f"worse (p = {comparison.judged.p:.2g})",
        "equivalent": f"equivalent (p = {comparison.judged.p_equivalent:.2g})",
        "not distinguishable": f"not distinguishable (p = {comparison.judged.p:.2g})",
    }
    return f"{names}: {size}: {words[verdict]}."


COLUMNS = (
    "measure", "arm", "other", "seeds", "mean", "standard_error", "low", "high", "p", "p_equivalent", "verdict",
    "prompt_low", "prompt_high",
)  # fmt: skip


def comparison_rows(comparisons: Sequence[Comparison]) -> list[tuple[object, ...]]:
    """Rows of differences.csv."""
    rows: list[tuple[object, ...]] = []
    for c in comparisons:
        d = c.judged.difference
        prompts = (c.prompts.low, c.prompts.high) if c.prompts else (math.nan, math.nan)
        numbers = (d.mean, d.standard_error, d.low, d.high, c.judged.p, c.judged.p_equivalent)
        rows.append((c.measure, c.arm, c.other, d.seeds, *numbers, c.judged.verdict, *prompts))
    return rows


def power_table(results: Results, *, chance: float = 0.8) -> str:
    """How many seeds a difference of the final score needs, from the spread between seeds that was seen.

    `alpha` is divided by the number of comparisons, the first and hardest step of Holm's correction.
    """
    plan = results.plan
    alpha = plan.alpha / len(plan.comparisons)
    sizes = [plan.margin / 2, plan.margin, 2 * plan.margin, 4 * plan.margin]
    lines = [
        f"seeds needed to find a true difference of {plan.metric} with chance {chance:.0%}, p < {alpha:.2g} each",
        f"{'comparison':<28} {'seeds':>5} {'spread':>7} {'finds':>7}  " + " ".join(f"{s:>8.3g}" for s in sizes),
    ]
    for arm, other in plan.comparisons:
        values = list(differences(results, "final", arm, other).values())
        if len(values) < 2:
            if values:
                lines.append(f"{arm + ' - ' + other:<28} {len(values):>5} one seed has no spread")
            continue
        spread = float(torch.tensor(values, dtype=torch.float64).std())
        if spread == 0:
            lines.append(f"{arm + ' - ' + other:<28} {len(values):>5} {0:>7.4f} every seed gave the same difference")
            continue
        needed = [seeds_needed(size, spread=spread, alpha=alpha, chance=chance) for size in sizes]
        finds = detectable(len(values), spread=spread, alpha=alpha, chance=chance)
        cells = " ".join(f"{n if n is not None else 'many':>8}" for n in needed)
        lines.append(f"{arm + ' - ' + other:<28} {len(values):>5} {spread:>7.4f} {finds:>7.3f}  {cells}")
    lines.append("finds: the smallest difference that the seeds run so far find with that chance.")
    return "\n".join(lines)
