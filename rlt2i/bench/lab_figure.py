"""The laboratory's figure: measured gains on theory's line, and what training made of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

CREDITS = ("uniform", "oracle", "shuffled", "inverted")
COLOURS = {"uniform": "#999999", "oracle": "#0072b2", "shuffled": "#d55e00", "inverted": "#cc79a7"}
"""Of Okabe and Ito's palette, which the colour-blind can tell apart."""


def lab_svg(gains: Sequence[Sequence[Any]], training: Sequence[tuple[int, int, str, float]]) -> str:
    """The figure of the rows of lab.csv and lab_training.csv, as SVG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for credit in CREDITS[1:]:
        rows = [row for row in gains if row[1] == credit and float(row[4]) > 1e-3]
        if rows:
            x, y, error = ([float(row[i]) for row in rows] for i in (4, 5, 6))
            left.errorbar(x, y, [2 * e for e in error], fmt="o", ms=4, label=credit, color=COLOURS[credit])
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
        right.bar(where, [fmean(v) for v in values], 0.18, yerr=errors, color=COLOURS[credit], label=credit)
    right.axhline(0, color="#999999", lw=1)
    right.set_xticks(range(len(places)), [f"a = {place}/16" for place in places])
    right.set_ylabel("reward gained by steps of one length")
    right.legend(frameon=False)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "rlt2i", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()) + "\n"
