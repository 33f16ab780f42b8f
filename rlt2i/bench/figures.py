"""The two charts of a benchmark: held-out curves by arm, and the paired differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.ticker import MaxNLocator

from rlt2i.bench.analysis import Comparison, Results, differences
from rlt2i.bench.plan import Plan
from rlt2i.report.charts import GRID, QUIET, SERIES, Series, axes, figure, line_chart, svg, text
from rlt2i.report.numbers import count, signed

_WIDE, _NARROW = 720, 340
_ROW, _HEAD, _FOOT = 44, 8, 62


def colour_of(plan: Plan, arm: str) -> int:
    """Place of an arm in the palette, the same in every chart."""
    return list(plan.arms).index(arm) % len(SERIES)


def curve_chart(results: Results, *, width: int = _WIDE, height: int = 340, standalone: bool = False) -> str:
    """Held-out score over iterations: means over seeds, and each seed thin behind them."""
    plan = results.plan
    thin, bold = [], []
    for arm in plan.arms:
        seeds = results.seeds(arm)
        if not seeds:
            continue
        steps = sorted(results.main[arm, seeds[0]])
        colour = colour_of(plan, arm)
        values = [[results.main[arm, seed][s] for s in steps] for seed in seeds]
        if len(seeds) > 1:
            thin += [Series(label=plan.label(arm), x=steps, y=y, colour=colour, faint=True) for y in values]
        label = f"{plan.label(arm)} ({count(len(seeds), 'seed')})"
        bold.append(Series(label=label, x=steps, y=[fmean(at) for at in zip(*values, strict=True)], colour=colour))
    return line_chart(
        [*thin, *bold], y_label=f"{plan.metric}, held-out prompts", width=width, height=height, standalone=standalone
    )


def difference_chart(
    results: Results, comparisons: Sequence[Comparison], *, width: int = _WIDE, standalone: bool = False
) -> str:
    """The differences after the last iteration: a mean, its intervals over seeds and over prompts, a dot per seed.

    Args:
        comparisons: of all measures; those of the final score are drawn.
    """
    plan = results.plan
    rows = [c for c in comparisons if c.measure == "final"]
    height = _HEAD + _ROW * max(1, len(rows)) + _FOOT
    label = "; ".join(f"{_name(plan, c)}: {signed(c.judged.difference.mean, 3)}" for c in rows)
    with figure(width, height) as canvas:
        plot = axes(canvas, 8, _HEAD, 14, _FOOT)
        plot.set_ylim(max(1, len(rows)) - 0.2, -0.8)
        plot.axvspan(-plan.margin, plan.margin, color=GRID, lw=0)
        plot.axvline(0, color=QUIET, lw=1)
        reach = [0.0, plan.margin]
        for row, c in enumerate(rows):
            colour, d = SERIES[colour_of(plan, c.arm)], c.judged.difference
            seeds = list(differences(results, "final", c.arm, c.other).values())
            plot.plot(seeds, [row] * len(seeds), ".", color=colour, alpha=0.45)
            if c.prompts is not None:
                plot.plot([c.prompts.low, c.prompts.high], [row, row], color=colour, lw=1.5, solid_capstyle="butt")
                reach += [c.prompts.low, c.prompts.high]
            if math.isfinite(d.low):
                plot.plot([d.low, d.high], [row, row], color=colour, lw=5, alpha=0.45, solid_capstyle="butt")
                if d.seeds > 2:  # two seeds have an interval that would squeeze all others
                    reach += [d.low, d.high]
            plot.plot([d.mean], [row], "o", color=colour, ms=7, mew=0)
            reach += seeds
            name = f"{_name(plan, c)}: {signed(d.mean, 3)}"
            plot.text(0.003, row - 0.4, name, transform=plot.get_yaxis_transform(), va="center")
        low, high = min(reach), max(reach)
        pad = 0.06 * (high - low)
        plot.set_xlim(low - pad, high + pad)
        plot.set_yticks([])
        plot.xaxis.set_major_locator(MaxNLocator(max(3, width // 90), steps=[1, 2, 5, 10]))
        plot.set_xlabel(f"difference of {plan.metric} (grey: within the margin of {plan.margin:g})")
        confidence = f"{100 * (1 - plan.alpha):g} %"
        legend = f"thick: {confidence} over seeds, thin: 95 % over prompts, dots: seeds"
        text(canvas, width / 2, height - 8, legend, color=QUIET, ha="center", fontsize=11)
        return svg(
            canvas, f"Differences of {plan.metric} after iteration {results.last}. {label}", standalone=standalone
        )


def _name(plan: Plan, c: Comparison) -> str:
    return f"{plan.label(c.arm)} − {plan.label(c.other)}"


def for_page(results: Results, comparisons: Sequence[Comparison]) -> dict[str, Mapping[str, str]]:
    """Both charts, drawn for a desk ("wide") and for a phone ("narrow")."""
    return {
        "curves": {"wide": curve_chart(results), "narrow": curve_chart(results, width=_NARROW, height=300)},
        "differences": {
            "wide": difference_chart(results, comparisons),
            "narrow": difference_chart(results, comparisons, width=_NARROW),
        },
    }
