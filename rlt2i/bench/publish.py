"""What of a benchmark is worth keeping in a repository: small tables, from which all that is said can be computed."""

from __future__ import annotations

from pathlib import Path

from rlt2i.bench.analysis import read_results
from rlt2i.bench.folder import PLAN, csv_text, read_table
from rlt2i.bench.page import write_results
from rlt2i.bench.plan import Plan
from rlt2i.bench.reference import write_bands
from rlt2i.bench.trial import SCORES, TIMING, VALUES
from rlt2i.config import dump_yaml, to_mapping
from rlt2i.runs.files import replace_text

KEPT = ("reward/mean", "kl/base")
"""Metrics of the training log that `rlt2i.bench.derived` reads."""


def publish(source: Path, plan: Plan, out: Path, *, bands: Path | None = None) -> str:
    """Write the reduced tables, figure and sentence of a benchmark, finished or not; returns the sentence.

    Kept are all held-out means, the scores by prompt of the plan's metric after the last iteration, of the training log
    what measures are derived from, and the seconds of each trial by phase; left out are the rest and the page.

    Args:
        bands: folder for the reference bands of the arms, see `rlt2i.bench.reference`.
    """
    results = read_results(source, plan)
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / PLAN, dump_yaml(to_mapping(plan, typed=False)))
    replace_text(out / "evaluations.csv", (source / "evaluations.csv").read_text(encoding="utf-8"))
    last = str(results.last)
    rows = [r for r in read_table(source / "scores.csv") if r["iteration"] == last and r["metric"] == plan.metric]
    replace_text(out / "scores.csv", csv_text(SCORES, ([row[name] for name in SCORES] for row in rows)))
    rows = [r for r in read_table(source / "training.csv") if r["metric"] in KEPT]
    replace_text(out / "training.csv", csv_text(VALUES, ([row[name] for name in VALUES] for row in rows)))
    seconds: dict[tuple[str, str, str, str], float] = {}
    for row in read_table(source / "timing.csv"):
        key = (row["arm"], row["seed"], last, row["phase"])
        seconds[key] = seconds.get(key, 0.0) + float(row["seconds"])
    replace_text(out / "timing.csv", csv_text(TIMING, ((*key, value) for key, value in seconds.items())))
    text = write_results(out, plan, page=False)
    if bands is not None:
        write_bands(results, bands)
    return text
