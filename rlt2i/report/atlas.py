"""The section of allocation maps: where credit went, step by step, in images that improved and that failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from rlt2i.report.axes import short
from rlt2i.report.curves import Series, line_chart
from rlt2i.report.gallery import embed
from rlt2i.report.html import Markup, h, join, marked, section
from rlt2i.report.maps import effective_support, scale_top, small_pair, spread
from rlt2i.report.pixels import to_array
from rlt2i.report.rundir import PASS, MapSample, has_pass_mark

_TITLE = "Where the credit went"
_PER_GROUP = 3
_COLUMNS = 10
_SIDE = 112

_HOW_TO_READ = (
    "Columns are denoising steps, from noise on the left to the finished image on the right; σ is the "
    "noise level at which the step starts. The upper row is the clean prediction: what the image would be "
    "if the model stopped there. The lower row is the weight that each place gets of the image's "
    "advantage, laid over a grey copy of the image.",
    "The advantage itself is one number for the whole image, positive or negative; the map says where it "
    "counts. A bright cell of weight 2 is updated twice as strongly as under uniform credit, a dark one "
    "hardly at all. Weights have mean one, so a map moves credit about and does not change the amount. In "
    "a failed image the bright places are those that are blamed. A map shows what the update used; it does "
    "not explain why the image came out as it did.",
)


def atlas(samples: Mapping[int, Sequence[MapSample]], problem: str, run_name: str) -> Markup:
    """The section.

    Args:
        samples: update -> samples, at least the first and the last update that were saved; empty if none was.
        problem: why there are none, or what else could not be read.
        run_name: for the command that makes some.
    """
    if not samples:
        return section("maps", _TITLE, _none(problem, run_name))
    steps = sorted(samples)
    first, last = samples[steps[0]], samples[steps[-1]]
    shown = {id(s.weights): s for group in (first, last) for s in group}
    top = scale_top(torch.cat([s.weights.flatten() for s in shown.values()]))
    largest = max(float(s.weights.max()) for s in shown.values())
    judged = has_pass_mark([s.score for s in (*first, *last)])
    groups = choose(first if len(steps) > 1 else (), last)
    body: list[Markup] = [h("p", text) for text in _HOW_TO_READ]
    body += [h("p", problem, cls="warning")] if problem else []
    body.append(_ramp(top, largest))
    for title, note, members in groups:
        body.append(h("h3", title, h("small", note)))
        for i in members:
            updates = [(steps[-1], last[i])]
            if len(steps) > 1 and i < len(first) and first[i].prompt == last[i].prompt:
                updates.insert(0, (steps[0], first[i]))
            body.append(_sample(updates, top, judged=judged))
    body.append(_support(samples))
    return section("maps", _TITLE, *body)


def _none(problem: str, run_name: str) -> Markup:
    return h(
        "p",
        f"{problem} ",
        h("code", "rlt2i train"),
        " saves maps at its evaluations when its credit has some; ",
        h("code", f'rlt2i maps {run_name} --prompt "..."'),
        " draws them for one prompt.",
        cls="missing",
    )


def choose(first: Sequence[MapSample], last: Sequence[MapSample]) -> list[tuple[str, str, list[int]]]:
    """Up to three samples each that improved and that failed: the first ones, not the finest."""
    scores = [s.score for s in (*first, *last)]
    paired = len(first) == len(last) and all(a.prompt == b.prompt for a, b in zip(first, last, strict=True))
    rows = range(len(last))
    if not any(math.isfinite(s.score) for s in last):
        return [("Samples", "no score was recorded", list(rows)[:_PER_GROUP])]
    if not has_pass_mark(scores):
        ranked = sorted(rows, key=lambda i: last[i].score if math.isfinite(last[i].score) else -math.inf)
        half = min(_PER_GROUP, max(1, len(ranked) // 2))
        groups = [("Best scores", "", ranked[::-1][:half]), ("Lowest scores", "", ranked[:half])]
        return [g for g in groups if g[2]] if len(ranked) > 1 else groups[:1]
    passes = [i for i in rows if last[i].score >= PASS]
    improved = [i for i in passes if paired and not first[i].score >= PASS]
    stayed = [i for i in passes if i not in improved]
    failed = [i for i in rows if last[i].score < PASS]
    groups = [
        ("Improved", f"failed at first, pass now: {len(improved)} of {len(last)} saved samples", improved),
        ("Failed", f"{len(failed)} of {len(last)} saved samples", failed),
    ]
    if not improved:
        groups.insert(0, ("Passed", f"{len(stayed)} of {len(last)} saved samples", stayed))
    return [(title, note, members[:_PER_GROUP]) for title, note, members in groups if members]


def _sample(updates: Sequence[tuple[int, MapSample]], top: float, *, judged: bool) -> Markup:
    """One prompt: its strip at each update."""
    prompt = marked(updates[-1][1].prompt, updates[-1][1].core)
    strips = [_strip(step, sample, top, judged=judged) for step, sample in updates]
    return h("div", h("h4", prompt, h("small", _core_note(updates[-1][1]))), *strips, cls="card")


def _core_note(sample: MapSample) -> str:
    if not sample.core:
        return "no core phrase was recorded"
    hidden = [phrase for phrase in sample.core if phrase.lower() not in sample.prompt.lower()]
    return "core phrases are marked" + (f"; also: {', '.join(hidden)}" if hidden else "")


def _strip(update: int, sample: MapSample, top: float, *, judged: bool) -> Markup:
    recorded = max(1 if sample.clean is None else len(sample.clean), len(sample.sigmas) - 1)
    steps = len(sample.weights) if len(sample.weights) > 1 else recorded
    columns = spread(steps, _COLUMNS)
    names: list[Markup] = [h("div", f"update {update}", Markup("<br>"), f"score {short(sample.score)}", cls="row-name")]
    upper: list[Markup] = [h("div", "clean prediction", cls="row-name")]
    lower: list[Markup] = [h("div", "weight", cls="row-name")]
    means = [float(w.mean()) for w in sample.weights]
    uneven = any(abs(mean - 1) > 0.02 for mean in means)
    for step in columns:
        level = f"σ {sample.sigmas[step]:.2f}" if step < len(sample.sigmas) else ""
        row = min(step, len(sample.weights) - 1)
        note = [Markup("<br>"), f"mean {means[row]:.2f}"] if uneven else []
        names.append(h("div", f"step {step}", Markup("<br>"), level, *note, cls="column-name"))
        has_clean = sample.clean is not None and step < len(sample.clean)
        image = sample.clean[step] if sample.clean is not None and has_clean else sample.final
        picture, over = small_pair(image, sample.weights[row], top=top, side=_SIDE)
        if sample.clean is not None:
            upper.append(embed(picture, f"clean prediction at step {step}") if has_clean else h("div"))
        lower.append(embed(over, f"weights at step {step}, largest {short(float(sample.weights[row].max()))}"))
    names.append(h("div", "finished", Markup("<br>"), "image", cls="column-name"))
    final = embed(
        Image.fromarray(to_array(sample.final)), "finished image", side=_SIDE, extra=_frame(sample.score, judged=judged)
    )
    cells = [*names, *upper, final, *lower, h("div")] if sample.clean is not None else [*names, *lower, final]
    layout = f"grid-template-columns: 5.2rem repeat({len(columns) + 1}, minmax(0, 1fr))"
    few = f"; max-width: {90 + 116 * (len(columns) + 1)}px; min-width: 0" if len(columns) < 5 else ""
    strip = h("div", h("div", *cells, cls="strip", style=layout + few), cls="scroll-x")
    return (
        join((strip, h("p", f"{len(columns)} of {steps} steps shown.", cls="quiet small")))
        if steps > len(columns)
        else strip
    )


def _frame(score: float, *, judged: bool) -> str:
    if math.isnan(score) or not judged:
        return "framed"
    return "framed pass" if score >= PASS else "framed fail"


def _ramp(top: float, largest: float) -> Markup:
    """The colour scale."""
    uniform = 100 / top
    end = f"{top:.1f}" + (f" and more (up to {largest:.1f})" if largest > top * 1.005 else "")
    ticks = join(
        (
            h("span", "0", style="left: 0"),
            h("span", "1 = uniform", style=f"left: {uniform:.1f}%"),
            h("span", end, style="left: 100%"),
        )
    )
    bar = h("div", h("i", style=f"left: {uniform:.1f}%"), cls="bar")
    return h(
        "div",
        bar,
        h("div", ticks, cls="ticks"),
        cls="ramp",
        role="img",
        **{"aria-label": f"weight from 0 to {end}"},
    )


def _support(samples: Mapping[int, Sequence[MapSample]]) -> Markup:
    """How concentrated the maps are, per step."""
    steps = sorted(samples)
    series = []
    for i, step in enumerate(dict.fromkeys((steps[0], steps[-1]))):
        group = [s.weights for s in samples[step]]
        if len({w.shape for w in group}) != 1 or group[0].shape[0] < 2:
            continue
        support = torch.nanmean(torch.stack([effective_support(w) for w in group]), dim=0).tolist()
        series.append(Series(label=f"update {step}", x=range(len(support)), y=support, colour=i))
    if not series:
        return Markup("")
    chart = line_chart(
        series,
        x_label="denoising step",
        y_label="share of the image",
        y_range=(0.0, 1.0),
        height=240,
        width=560,
    )
    text = (
        "How far a map spreads, averaged over all saved samples: (mean weight)² / mean weight². 1 is "
        "uniform credit; 0.25 is as concentrated as equal weight on a quarter of the image."
    )
    return join((h("h3", "Spread of the maps"), h("p", text), h("div", Markup(chart), cls="card half")))
