"""Charts as SVG by matplotlib: text stays text, and a chart within a page takes the page's colours, light or dark."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import attrs
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from rlt2i.inputs.display import visible
from rlt2i.report.numbers import short

SERIES = (
    "#0072B2", "#D55E00", "#007A5A", "#A6439A", "#8A6D00", "#4C4C4C", "#A3133C", "#5B3FC4", "#4B6B00",
)  # fmt: skip
"""Okabe and Ito's hues, darkened until each has a contrast of 3:1 against white."""
SERIES_DARK = (
    "#5BB3E6", "#FF9A57", "#4FC9A2", "#E08FD6", "#DDBB4A", "#BDBDBD", "#FF8098", "#A99BFF", "#B5CF5A",
)  # fmt: skip
"""The same hues in the same order, for a dark page."""
INK, QUIET, GRID = "#1d1d1f", "#5f5f66", "#e3e3e8"

_FAMILY = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_DASHES: tuple[Any, ...] = (
    "-", (0, (4, 1.5)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (2.5, 1)), (0, (0.5, 1)), (0, (7, 2)),
    (0, (3, 1, 1, 1, 1, 1)), (0, (6, 1, 2, 1)),
)  # fmt: skip
_MARKERS = "os^DvPX*h"
_MAX_MARKERS = 24
_VARIABLES = {"ink": INK, "quiet": QUIET, "line": GRID} | {f"s{i}": colour for i, colour in enumerate(SERIES)}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlt2i",
    "text.parse_math": False,  # a dollar sign in a prompt is a dollar sign
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "path.simplify_threshold": 0.5,
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "ytick.major.size": 0,
    "ytick.major.pad": 8,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
}


@attrs.frozen(kw_only=True, eq=False)
class Series:
    """One line.

    Attributes:
        label: name in the legend; series that share a label share an entry.
        x, y: N points; where y is not finite the line is broken.
        low, high: bounds of the error band, N each, or both empty.
        colour: index into the palette; -1 takes the series' own place.
        faint: a thin line without markers and legend entry, for single seeds behind their mean.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: int = -1
    faint: bool = False

    def __attrs_post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"Series({self.label!r}): {len(self.x)} x for {len(self.y)} y.")
        if len(self.low) != len(self.high) or (self.low and len(self.low) != len(self.y)):
            raise ValueError(
                f"Series({self.label!r}): {len(self.low)} low and {len(self.high)} high for {len(self.y)} y; "
                "a band needs both bounds at every point."
            )


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of that many pixels in the house style; draw, and take `svg` or `picture` of it, in the context."""
    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width / 72, height / 72), dpi=72)


def text(canvas: Figure, x: float, y: float, words: str, **style: Any) -> None:
    """Write at pixels counted from the top left corner."""
    width, height = canvas.get_size_inches() * 72
    canvas.text(x / width, 1 - y / height, words, **style)


def axes(canvas: Figure, left: float, top: float, right: float, bottom: float) -> Axes:
    """Axes with these margins in pixels."""
    width, height = canvas.get_size_inches() * 72
    return canvas.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))


def svg(canvas: Figure, label: str, *, standalone: bool = False) -> str:
    """One <svg> element.

    Args:
        label: what the chart says, for readers who do not see it.
        standalone: a file of its own, on white paper. Otherwise the colours are the variables of the page around it.
    """
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", transparent=not standalone, metadata={"Date": None})
    written = buffer.getvalue()
    body = written[written.index(">", written.index("<svg")) + 1 : written.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'font-family: [^;"]*;? ?', "", body)  # the page's, or that of the element below
    body = re.sub(r"\s*\n\s*", " ", body)
    salt = hashlib.sha256((body + label).encode()).hexdigest()[:8]  # names are unique in a page of many charts
    body = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{salt}-", body)
    if not standalone:
        for name, colour in _VARIABLES.items():
            body = body.replace(colour.lower(), f"var(--{name}, {colour})")
    width, height = (f"{72 * side:.0f}" for side in canvas.get_size_inches())
    return visible(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="chart" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" stroke-linejoin="round" '
        f'aria-label="{escape(label)}" font-family="{_FAMILY}">{body}</svg>'
    )


def line_chart(
    series: Sequence[Series],
    *,
    title: str = "",
    x_label: str = "iteration",
    y_label: str = "",
    width: int = 720,
    height: int = 320,
    y_range: tuple[float, float] | None = None,
    from_zero: bool = False,
    reference: tuple[float, str] | None = None,
    standalone: bool = False,
) -> str:
    """Draw lines over a shared x axis.

    Args:
        series: the lines, drawn in this order; without any finite point the chart says so.
        title, x_label, y_label: text; the title also names the chart for screen readers.
        width, height: size in pixels; the chart scales with its container.
        y_range: fixed range; values outside are cut off at its edge.
        from_zero: let the range start at 0.
        reference: a value and its name, drawn as a dashed horizontal line.
        standalone: a file of its own, with white paper behind it.

    Returns:
        One <svg> element.
    """
    lines = [attrs.evolve(s, colour=(s.colour if s.colour >= 0 else i) % len(SERIES)) for i, s in enumerate(series)]
    lines = [s for s in lines if _finite(s)]
    name = title or y_label or "chart"
    with figure(width, height) as canvas:
        if not lines:
            text(canvas, width / 2, height / 2, f"{name}: no data", ha="center", fontsize=13, color=QUIET)
            return svg(canvas, f"{name}: no data", standalone=standalone)
        if title:
            text(canvas, 4, 17, title, fontsize=14, fontweight="bold")
        top = _legend(canvas, lines, 26 if title else 6, width)
        plot = canvas.add_axes((0.0, 0.0, 1.0, 1.0))
        for s in lines:
            _draw(plot, s)
        _scale(plot, lines, y_range, from_zero, ticks=max(3, min(7, height // 45)), x_ticks=max(2, min(8, width // 70)))
        labels = plot.yaxis.get_major_formatter().format_ticks(list(plot.get_yticks()))
        if power := plot.yaxis.get_major_formatter().get_offset():
            y_label = f"{y_label} × {power}".strip()
            plot.yaxis.offsetText.set_visible(False)
        if y_label:
            text(canvas, 4, top + 12, y_label, color=QUIET)
        left = 14 + 7.2 * max(len(label) for label in labels)
        top, bottom = top + (26 if y_label else 8), 40 if x_label else 24
        plot.set_position((left / width, bottom / height, 1 - (left + 16) / width, 1 - (top + bottom) / height))
        plot.set_xlabel(x_label)
        if reference:
            plot.axhline(reference[0], color=QUIET, linewidth=1, dashes=(4, 4))
            place = plot.get_yaxis_transform()
            above = lines[0].y[_finite(lines[0])[-1]] > reference[0]  # the label keeps clear of the line's end
            shift, anchor = (-4, "top") if above else (4, "bottom")
            plot.annotate(
                reference[1], (1, reference[0]), xycoords=place, xytext=(0, shift), textcoords="offset points",
                ha="right", va=anchor, color=QUIET,
            )  # fmt: skip
        return svg(canvas, f"{name}. {_described(lines)}", standalone=standalone)


def _finite(s: Series) -> list[int]:
    """Indices of the points that can be drawn."""
    return [i for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)) if math.isfinite(x) and math.isfinite(y)]


def _draw(plot: Axes, s: Series) -> None:
    """Band, line and markers; shapes and dashes differ as well as colours, for print and for colour-blind readers."""
    colour, kept = SERIES[s.colour], _finite(s)
    if s.low and len(kept) == 1:  # a band of one point has no area: draw a bar
        plot.vlines(s.x[kept[0]], s.low[kept[0]], s.high[kept[0]], color=colour, linewidth=1.5)
    elif s.low:
        plot.fill_between(s.x, s.low, s.high, color=colour, alpha=0.16, linewidth=0)
    if s.faint:
        plot.plot(s.x, s.y, color=colour, alpha=0.45, linewidth=1)
        return
    plot.plot(s.x, s.y, color=colour, linewidth=2, linestyle=_DASHES[s.colour], solid_capstyle="round")
    for i in kept if len(s.x) <= _MAX_MARKERS else ():
        band = f" [{short(s.low[i])}, {short(s.high[i])}]" if s.low else ""
        tip = f"tip:{s.label}: {short(s.y[i])}{band} at {short(s.x[i])}"
        plot.plot(s.x[i], s.y[i], _MARKERS[s.colour], color=colour, markersize=6, markeredgewidth=0, gid=tip)


def _scale(
    plot: Axes, lines: Sequence[Series], y_range: tuple[float, float] | None, from_zero: bool, ticks: int, x_ticks: int
) -> None:
    """Ranges and ticks: round numbers, and whole ones below, because there is no iteration 2.5."""
    xs = [s.x[i] for s in lines for i in _finite(s)]
    if max(xs) > min(xs):
        plot.set_xlim(min(xs), max(xs))
        plot.xaxis.set_major_locator(MaxNLocator(x_ticks, integer=True, steps=[1, 2, 5, 10]))
    else:
        plot.set_xlim(xs[0] - 0.5, xs[0] + 0.5)
        plot.set_xticks(xs[:1])
    if from_zero:
        plot.set_ylim(bottom=0)
    if y_range:
        plot.set_ylim(*y_range)
    low, high = plot.get_ylim()
    if all(low <= s.y[i] <= high for s in lines for i in _finite(s)):
        for artist in plot.lines:
            artist.set_clip_on(False)  # a marker at the edge stays whole
    plot.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
    plot.grid(axis="y")
    formatter = ScalarFormatter()
    formatter.set_powerlimits((-3, 5))
    plot.yaxis.set_major_formatter(formatter)


def _legend(canvas: Figure, lines: Sequence[Series], top: float, width: float) -> float:
    """Entries in rows, and where they end; a single series needs none, its axis says what it is."""
    named = {s.label: s for s in lines if s.label and not s.faint}
    if len(named) < 2:
        return top
    handles = [
        Line2D([], [], color=SERIES[s.colour], marker=_MARKERS[s.colour], markersize=6, linewidth=2,
               linestyle=_DASHES[s.colour], markeredgewidth=0)
        for s in named.values()
    ]  # fmt: skip
    columns = max(1, min(len(named), int(width // (44 + 7.2 * max(map(len, named))))))
    canvas.legend(
        handles, list(named), loc="upper left", bbox_to_anchor=(0, 1 - top / (canvas.get_figheight() * 72)),
        ncols=columns, frameon=False, borderpad=0, borderaxespad=0, labelspacing=0.5, handlelength=1.9,
        columnspacing=1.6,
    )  # fmt: skip
    return top + 20 * -(-len(named) // columns)


def _described(lines: Sequence[Series]) -> str:
    """One sentence per line for readers who do not see it."""
    ends = [(s, _finite(s)) for s in lines if not s.faint]
    return "; ".join(
        f"{s.label}: {short(s.y[kept[0]])} at {short(s.x[kept[0]])}, {short(s.y[kept[-1]])} at {short(s.x[kept[-1]])}"
        for s, kept in ends
    )
