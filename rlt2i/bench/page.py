"""The figures and the page of a benchmark."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import jinja2
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlt2i.bench.analysis import (
    COLUMNS,
    MEASURES,
    Comparison,
    Results,
    compare,
    comparison_rows,
    differences,
    power_table,
    read_results,
    sentence,
)
from rlt2i.bench.folder import csv_text
from rlt2i.bench.plan import Plan
from rlt2i.bench.statistics import FEWEST_SEEDS, paired
from rlt2i.config import dump_yaml, to_mapping
from rlt2i.runs.files import replace_text

COLOURS = ("#0072b2", "#999999", "#d55e00", "#cc79a7", "#009e73", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, which the colour-blind can tell apart."""


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "rlt2i", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()) + "\n"


def colour(plan: Plan, arm: str) -> str:
    """The colour of an arm in every figure."""
    return COLOURS[list(plan.arms).index(arm) % len(COLOURS)]


def curves_svg(results: Results) -> str:
    """Held-out curves, and the differences of the final score from the reference, seed by seed."""
    plan = results.plan
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for arm in plan.arms:
        seeds = results.seeds(arm)
        if not seeds:
            continue
        steps = sorted(results.main[arm, seeds[0]])
        for seed in seeds:
            left.plot(steps, [results.main[arm, seed][s] for s in steps], color=colour(plan, arm), alpha=0.15, lw=0.8)
        means = [fmean(results.main[arm, seed][s] for seed in seeds) for s in steps]
        left.plot(steps, means, color=colour(plan, arm), lw=2, label=f"{plan.label(arm)} ({len(seeds)})")
    left.set_xlabel("iteration")
    left.set_ylabel(f"{plan.metric}, held-out")
    left.legend(title="mean (seeds)", frameon=False, fontsize=8)
    _differences(right, results)
    return svg(figure)


def _differences(axes: Axes, results: Results) -> None:
    """A dot per seed and a 95 % interval per arm."""
    plan = results.plan
    arms = [arm for arm in plan.arms if arm != plan.reference and results.seeds(arm)]
    axes.axvspan(-plan.margin, plan.margin, color="#eeeeee", lw=0)
    axes.axvline(0, color="#999999", lw=1)
    for row, arm in enumerate(arms):
        values = list(differences(results, "final", arm, plan.reference).values())
        axes.plot(values, [row] * len(values), ".", color=colour(plan, arm), alpha=0.4)
        if len(values) > 1:
            found = paired(values, confidence=1 - plan.alpha)
            axes.plot([found.low, found.high], [row, row], color=colour(plan, arm), lw=2)
            axes.plot([found.mean], [row], "o", color=colour(plan, arm))
    axes.set_yticks(range(len(arms)), [plan.label(arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(f"{plan.metric} minus {plan.label(plan.reference)} (grey: within the margin)")


def arm_rows(results: Results) -> list[tuple[str, str, str, str, str]]:
    """(label, seeds, before, after, seconds an iteration) of every arm that ran."""
    rows = []
    for arm in results.plan.arms:
        seeds = results.seeds(arm)
        if not seeds:
            continue
        curves = [results.main[arm, seed] for seed in seeds]
        final = [curve[results.last] for curve in curves]
        spread = f" ± {stdev(final):.3f}" if len(final) > 1 else ""
        seconds = fmean(results.seconds[arm, seed] for seed in seeds)
        rows.append(
            (results.plan.label(arm), str(len(seeds)), f"{fmean(min(c.items())[1] for c in curves):.3f}",
             f"{fmean(final):.3f}{spread}", f"{seconds:.2f}")
        )  # fmt: skip
    return rows


def comparison_texts(plan: Plan, comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """(measure, comparison, difference, interval over seeds, interval over prompts, p, verdict) as text."""
    rows: list[tuple[str, ...]] = []
    for c in comparisons:
        d = c.judged.difference
        prompts = f"[{c.prompts.low:+.3f}, {c.prompts.high:+.3f}]" if c.prompts else ""
        verdict = c.judged.verdict
        if c.measure not in MEASURES:
            verdict = {"better": "higher", "worse": "lower"}.get(verdict, verdict)  # type: ignore[assignment]
        rows.append(
            (
                c.measure,
                f"{plan.label(c.arm)} − {plan.label(c.other)}",
                f"{d.mean:+.3f}",
                f"[{d.low:+.3f}, {d.high:+.3f}]" if d.seeds > 1 else "",
                prompts,
                f"{c.judged.p:.2g}" if d.seeds > 1 else "",
                verdict if d.seeds >= FEWEST_SEEDS else "too few seeds",
            )
        )
    return rows


def write_page(path: Path, results: Results, comparisons: Sequence[Comparison], text: str) -> None:
    """One self-contained HTML page."""
    plan = results.plan
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("rlt2i.bench", "."), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("page.html.j2")
    page = template.render(
        plan=plan,
        lines=text.splitlines(),
        figure=curves_svg(results),
        arms=arm_rows(results),
        main=comparison_texts(plan, [c for c in comparisons if c.measure in MEASURES]),
        rest=comparison_texts(plan, [c for c in comparisons if c.measure not in MEASURES]),
        measures=MEASURES,
        power=power_table(results),
        yaml=dump_yaml(to_mapping(plan, typed=False)),
    )
    replace_text(path, page)


def write_results(path: Path, plan: Plan) -> str:
    """Judge the tables of a folder and write differences.csv, curves.svg, index.html and sentence.txt."""
    results = read_results(path, plan)
    comparisons = compare(results)
    text = sentence(results, comparisons)
    replace_text(path / "differences.csv", csv_text(COLUMNS, comparison_rows(comparisons)))
    replace_text(path / "curves.svg", curves_svg(results))
    replace_text(path / "sentence.txt", text + "\n")
    write_page(path / "index.html", results, comparisons, text)
    return text
