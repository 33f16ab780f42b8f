"""Line charts as plain SVG: several series, error bands, a legend; no plotting library, no script.

Colours are written as attributes, so that a file stands alone anywhere; every coloured element also has a
class (`s0` ... `s5`, `axis`, `grid`, `ink`), by which a page may restyle it for dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import attrs

from rlt2i.report.axes import integer_ticks, nice_ticks, padded, short, tick_labels
from rlt2i.report.palette import SERIES

_INK, _QUIET, _GRID = "#1d1d1f", "#5f5f66", "#e3e3e8"
_FAMILY = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2", "1 2")
_MAX_POINTS = 400
_MAX_MARKERS = 24


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


@attrs.frozen(kw_only=True)
class Frame:
    """Where the plot lies within the picture, and the ranges that it shows."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + self.width * (value - low) / (high - low), 2)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(self.top + self.height * (1 - share), 2)


def line_chart(
    series: Sequence[Series],
    *,
    title: str = "",
    x_label: str = "update",
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
        y_range: fixed range; values outside are drawn at its edge.
        from_zero: let the automatic range start at 0.
        reference: a value and its name, drawn as a dashed horizontal line.
        standalone: a file of its own, with white paper behind it.

    Returns:
        One <svg> element.
    """
    series = [
        attrs.evolve(thin(s), colour=(s.colour if s.colour >= 0 else i) % len(SERIES)) for i, s in enumerate(series)
    ]
    name = title or y_label or "chart"
    points = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if not points:
        body = [_text(width / 2, height / 2, f"{name}: no data", anchor="middle", size=13, quiet=True)]
        return _svg(body, width, height, name, "no data", standalone)
    legend, legend_rows = _legend(series, width)
    top = (26 if title else 8) + 20 * legend_rows + (26 if y_label else 6)
    y_values = [y for _, y in points] + [v for s in series for v in (*s.low, *s.high) if math.isfinite(v)]
    y_values += [reference[0]] if reference else []
    shown = y_range or padded(y_values, from_zero=from_zero)
    ticks = nice_ticks(*shown, target=max(3, min(7, height // 45)))
    labels = tick_labels(ticks)
    left = 14 + 6.6 * max(len(label) for label in labels)
    frame = Frame(
        left=left,
        top=top,
        width=width - left - 18,
        height=height - top - (42 if x_label else 26),
        x_range=_x_range([x for x, _ in points]),
        y_range=shown,
    )
    body = _axes(frame, ticks, labels, x_label=x_label, y_label=y_label)
    if reference:
        body += _reference(frame, *reference)
    for s in series:
        body += _band(frame, s)
    for s in series:
        body += _line(frame, s)
    if title:
        body.append(_text(4, 17, title, size=14, bold=True))
    body += [f'<g transform="translate(0 {26 if title else 6})">', *legend, "</g>"] if legend else []
    return _svg(body, width, height, name, _describe(series), standalone)


def thin(series: Series, limit: int = _MAX_POINTS) -> Series:
    """Keep about `limit` points: of each bucket the lowest and the highest, so that no spike disappears."""
    if len(series.x) <= limit:
        return series
    size = math.ceil(2 * len(series.x) / limit)
    keep: list[int] = []
    for start in range(0, len(series.x), size):
        bucket = range(start, min(start + size, len(series.x)))
        keep += sorted({min(bucket, key=lambda i: series.y[i]), max(bucket, key=lambda i: series.y[i])})
    keep = sorted({0, *keep, len(series.x) - 1})

    def pick(values: Sequence[float]) -> list[float]:
        return [values[i] for i in keep] if values else []

    return attrs.evolve(series, x=pick(series.x), y=pick(series.y), low=pick(series.low), high=pick(series.high))


def _x_range(xs: Sequence[float]) -> tuple[float, float]:
    low, high = min(xs), max(xs)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _axes(frame: Frame, ticks: list[float], labels: list[str], *, x_label: str, y_label: str) -> list[str]:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    body = []
    for tick, label in zip(ticks, labels, strict=True):
        y = frame.y(tick)
        body.append(f'<line class="grid" x1="{frame.left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}" stroke="{_GRID}"/>')
        body.append(_text(frame.left - 7, y + 4, label, anchor="end", quiet=True))
    body.append(
        f'<line class="axis" x1="{frame.left:.1f}" x2="{right:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}" '
        f'stroke="{_QUIET}"/>'
    )
    x_ticks = integer_ticks(*frame.x_range, target=max(2, min(8, int(frame.width // 80))))
    for tick, label in zip(x_ticks, tick_labels(x_ticks) if len(x_ticks) > 1 else [short(x_ticks[0])], strict=True):
        x = frame.x(tick)
        body.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}" stroke="{_QUIET}"/>')
        body.append(_text(x, bottom + 17, label, anchor="middle", quiet=True))
    if x_label:
        body.append(_text(frame.left + frame.width / 2, bottom + 35, x_label, anchor="middle", quiet=True))
    if y_label:
        body.append(_text(4, frame.top - 13, y_label, quiet=True))
    return body


def _reference(frame: Frame, value: float, label: str) -> list[str]:
    y, right = frame.y(value), frame.left + frame.width
    above = y - 5 if y - frame.top > 16 else y + 14
    return [
        f'<line class="axis" x1="{frame.left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}" stroke="{_QUIET}" '
        'stroke-dasharray="4 4"/>',
        _text(right, above, label, anchor="end", quiet=True),
    ]


def _runs(s: Series) -> list[list[int]]:
    """Indices of unbroken stretches of finite points."""
    runs: list[list[int]] = [[]]
    for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)):
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _band(frame: Frame, s: Series) -> list[str]:
    if not s.low:
        return []
    body = []
    for run in _runs(s):
        run = [i for i in run if math.isfinite(s.low[i]) and math.isfinite(s.high[i])]
        if len(run) == 1:  # a band of one point has no area: draw a bar
            x = frame.x(s.x[run[0]])
            body.append(
                f'<line class="s{s.colour}" x1="{x}" x2="{x}" y1="{frame.y(s.low[run[0]])}" '
                f'y2="{frame.y(s.high[run[0]])}" stroke="{SERIES[s.colour]}" stroke-width="1.5"/>'
            )
        elif run:
            upper = [f"{frame.x(s.x[i])},{frame.y(s.high[i])}" for i in run]
            lower = [f"{frame.x(s.x[i])},{frame.y(s.low[i])}" for i in reversed(run)]
            body.append(
                f'<polygon class="f{s.colour}" points="{" ".join(upper + lower)}" fill="{SERIES[s.colour]}" '
                'fill-opacity="0.16"/>'
            )
    return body


def _line(frame: Frame, s: Series) -> list[str]:
    body = []
    thickness, opacity = (1, 0.45) if s.faint else (2, 1)
    dashes = "" if s.faint else _DASHES[s.colour]
    for run in _runs(s):
        points = " ".join(f"{frame.x(s.x[i])},{frame.y(s.y[i])}" for i in run)
        body.append(
            f'<polyline class="s{s.colour}" points="{points}" fill="none" stroke="{SERIES[s.colour]}" '
            f'stroke-width="{thickness}" stroke-opacity="{opacity}" stroke-linejoin="round" '
            'stroke-linecap="round"' + (f' stroke-dasharray="{dashes}"' if dashes else "") + "/>"
        )
    if not s.faint and len(s.x) <= _MAX_MARKERS:
        for run in _runs(s):
            for i in run:
                band = f" [{short(s.low[i])}, {short(s.high[i])}]" if s.low else ""
                tip = f"{s.label}: {short(s.y[i])}{band} at {short(s.x[i])}"
                body.append(_marker(frame.x(s.x[i]), frame.y(s.y[i]), s.colour, tip))
    return body


def _marker(x: float, y: float, colour: int, tip: str = "") -> str:
    """Shapes differ as well as colours, for print and for colour-blind readers."""
    paint = f'class="f{colour}" fill="{SERIES[colour]}"'
    title = f"<title>{escape(tip)}</title>" if tip else ""
    if colour % 3 == 0:
        return f'<circle {paint} cx="{x}" cy="{y}" r="3.4">{title}</circle>'
    if colour % 3 == 1:
        return f'<rect {paint} x="{x - 3:.2f}" y="{y - 3:.2f}" width="6" height="6">{title}</rect>'
    outline = f"M{x} {y - 4.2:.2f} L{x + 4:.2f} {y + 3:.2f} L{x - 4:.2f} {y + 3:.2f} Z"
    return f'<path {paint} d="{outline}">{title}</path>'


def _legend(series: Sequence[Series], width: int) -> tuple[list[str], int]:
    """Entries in rows; a single series needs none, its axis says what it is."""
    named = {s.label: s for s in series if s.label and not s.faint}
    if len(named) < 2:
        return [], 0
    body, x, row = [], 6.0, 0
    for label, s in named.items():
        needed = 44 + 6.9 * len(label)
        if x + needed > width and x > 6:
            x, row = 6.0, row + 1
        y = 10 + 20 * row
        dashes = f' stroke-dasharray="{_DASHES[s.colour]}"' if _DASHES[s.colour] else ""
        body.append(
            f'<line class="s{s.colour}" x1="{x}" x2="{x + 22}" y1="{y}" y2="{y}" stroke="{SERIES[s.colour]}" '
            f'stroke-width="2"{dashes}/>'
        )
        body.append(_marker(x + 11, y, s.colour))
        body.append(_text(x + 28, y + 4, label))
        x += needed
    return body, row + 1


def _describe(series: Sequence[Series]) -> str:
    """One sentence per line for readers who do not see it."""
    parts = []
    for s in series:
        ends = [(s.x[i], s.y[i]) for run in _runs(s) for i in (run[0], run[-1])]
        if ends and not s.faint:
            (x0, y0), (x1, y1) = ends[0], ends[-1]
            parts.append(f"{s.label}: {short(y0)} at {short(x0)}, {short(y1)} at {short(x1)}")
    return "; ".join(parts)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 12,
    bold: bool = False,
    quiet: bool = False,
) -> str:
    weight = ' font-weight="600"' if bold else ""
    colour, name = (_QUIET, "quiet") if quiet else (_INK, "ink")
    return (
        f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{colour}"{weight}>{escape(text)}</text>'
    )


def _svg(body: list[str], width: int, height: int, name: str, description: str, standalone: bool) -> str:
    paper = f'<rect width="{width}" height="{height}" fill="#ffffff"/>' if standalone else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(f"{name}. {description}")}" '
        f'font-family="{_FAMILY}">' + paper + "".join(body) + "</svg>"
    )
