"""The page of a benchmark, and the files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from jinja2 import PackageLoader

from rlt2i.bench.analysis import (
    COLUMNS,
    MEASURES,
    Comparison,
    Results,
    compare,
    comparison_rows,
    power_table,
    read_results,
    sentence,
)
from rlt2i.bench.figures import curve_chart, difference_chart, for_page
from rlt2i.bench.folder import BenchFolder, csv_text
from rlt2i.bench.pictures import kept_pictures
from rlt2i.bench.plan import Plan
from rlt2i.bench.statistics import FEWEST_SEEDS
from rlt2i.config import dump_yaml, to_mapping
from rlt2i.report.page import environment
from rlt2i.runs.files import replace_text

ARM_COLUMNS = ("seeds", "before", "after ± SD", "seconds an iteration", "of these, credit", "network evaluations")
"""What `arm_rows` says of an arm; the last as a multiple of the reference's."""


def arm_rows(results: Results) -> list[tuple[str, ...]]:
    """(label, *ARM_COLUMNS) of every arm that ran."""
    rows: list[tuple[str, ...]] = []
    for arm in results.plan.arms:
        seeds = results.seeds(arm)
        if not seeds:
            continue
        curves = [results.main[arm, seed] for seed in seeds]
        final = [curve[results.last] for curve in curves]
        spread = f" ± {stdev(final):.3f}" if len(final) > 1 else ""
        seconds, credit = (
            fmean(s.get((arm, k), 0.0) for k in seeds) for s in (results.seconds, results.credit_seconds)
        )
        before = fmean(min(curve.items())[1] for curve in curves)
        evaluations = results.cost[arm] / results.cost[results.plan.reference]
        rows.append(
            (results.plan.label(arm), str(len(seeds)), f"{before:.3f}", f"{fmean(final):.3f}{spread}",
             f"{seconds:.2f}", f"{credit:.3f}", f"{evaluations:.2f}")
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


def _tiles(results: Results) -> list[tuple[str, str]]:
    """(score after the last iteration, whose) of every arm that ran."""
    return [(after.split(" ")[0], f"{label} (from {before})") for label, _, before, after, *_ in arm_rows(results)]


def render_page(
    results: Results, comparisons: Sequence[Comparison], text: str, pictures: Mapping[str, Any] | None
) -> str:
    """One self-contained HTML page.

    Args:
        text: the sentence, a line per comparison.
        pictures: see `rlt2i.bench.pictures.kept_pictures`.
    """
    plan = results.plan
    template = environment(PackageLoader("rlt2i.bench", ".")).get_template("page.html.j2")
    return template.render(
        plan=plan,
        lines=text.splitlines(),
        tiles=_tiles(results),
        charts=for_page(results, comparisons),
        last=results.last,
        arm_columns=ARM_COLUMNS,
        arms=arm_rows(results),
        main=comparison_texts(plan, [c for c in comparisons if c.measure in MEASURES]),
        rest=comparison_texts(plan, [c for c in comparisons if c.measure not in MEASURES]),
        measures=MEASURES,
        power=power_table(results) if plan.seeds > 1 else "",
        pictures=pictures,
        yaml=dump_yaml(to_mapping(plan, typed=False)),
    )


def write_results(path: Path, plan: Plan, *, page: bool = True) -> str:
    """Judge the tables of a folder and write differences.csv, curves.svg, differences.svg, sentence.txt.

    Args:
        page: also write index.html, with pictures where the runs were kept.
    """
    results = read_results(path, plan)
    comparisons = compare(results)
    text = sentence(results, comparisons)
    replace_text(path / "differences.csv", csv_text(COLUMNS, comparison_rows(comparisons)))
    replace_text(path / "curves.svg", curve_chart(results, standalone=True) + "\n")
    replace_text(path / "differences.svg", difference_chart(results, comparisons, standalone=True) + "\n")
    replace_text(path / "sentence.txt", text + "\n")
    if page:
        pictures = kept_pictures(BenchFolder(path=path), plan)
        replace_text(path / "index.html", render_page(results, comparisons, text, pictures))
    return text
