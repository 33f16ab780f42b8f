"""The laboratory's figure: measured gains on theory's line, and what training made of them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from rlt2i.bench.page import COLOURS, svg

CREDITS = ("uniform", "oracle", "shuffled", "inverted")


def lab_svg(gains: Sequence[Sequence[Any]], training: Sequence[tuple[int, int, str, float]]) -> str:
    """The figure of the rows of lab.csv and lab_training.csv, as SVG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for credit in CREDITS[1:]:
        rows = [row for row in gains if row[1] == credit and float(row[4]) > 1e-3]
        if rows:
            x, y, error = ([float(row[i]) for row in rows] for i in (4, 5, 6))
            left.errorbar(x, y, [2 * e for e in error], fmt="o", ms=4, label=credit, color=_colour(credit))
    ends = [float(row[4]) for row in gains if float(row[4]) > 1e-3]
    left.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#999999", lw=1, zorder=0)
    left.set_xscale("log", base=2)
    left.set_yscale("log", base=2, nonpositive="clip")
    left.set_xlabel("signal-to-noise over uniform, theory")
    left.set_ylabel("measured (bars: two standard errors)")
    left.legend(frameon=False)
    places = sorted({row[0] for row in training})
    for i, credit in enumerate(CREDITS):
        values = [[row[3] for row in training if (row[0], row[2]) == (place, credit)] for place in places]
        errors = [2 * stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in values]
        where = [j + (i - 1.5) * 0.2 for j in range(len(places))]
        right.bar(where, [fmean(v) for v in values], 0.18, yerr=errors, color=_colour(credit), label=credit)
    right.axhline(0, color="#999999", lw=1)
    right.set_xticks(range(len(places)), [f"a = {place}/16" for place in places])
    right.set_ylabel("reward gained by steps of one length")
    right.legend(frameon=False)
    return svg(figure)


def _colour(credit: str) -> str:
    return {"uniform": COLOURS[1], "oracle": COLOURS[0], "shuffled": COLOURS[2], "inverted": COLOURS[3]}[credit]
