"""The section of allocation maps: where credit went, step by step, in images that improved and that failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlt2i.functional.maps import effective_support
from rlt2i.report.charts import Series
from rlt2i.report.gallery import FRAMES, embedded
from rlt2i.report.maps import scale_end, scale_top, small_pair, spread
from rlt2i.report.numbers import short
from rlt2i.report.rundir import PASS, MapSample, has_pass_mark
from rlt2i.report.sections import two_sizes

_PER_GROUP = 3
_COLUMNS, _FEW, _SIDE = 10, 4, 112


def atlas(samples: Mapping[int, Sequence[MapSample]], problem: str) -> Mapping[str, Any]:
    """The section's pictures and numbers.

    Args:
        samples: iteration -> samples, at least the first and the last that were saved; empty if none was.
        problem: why there are none, or what else could not be read.
    """
    if not samples:
        return {"problem": problem, "groups": []}
    steps = sorted(samples)
    first, last = samples[steps[0]], samples[steps[-1]]
    shown = {id(s.weights): s for group in (first, last) for s in group}
    top = scale_top(torch.cat([s.weights.flatten() for s in shown.values()]))
    judged = has_pass_mark([s.score for s in (*first, *last)])

    def verdict(member: MapSample) -> bool | None:
        return member.score >= PASS if judged and not math.isnan(member.score) else None

    def sample(i: int) -> Mapping[str, Any]:
        shown_at = [(steps[-1], last[i])]
        if len(steps) > 1 and i < len(first) and first[i].prompt == last[i].prompt:
            shown_at.insert(0, (steps[0], first[i]))
        return {
            "prompt": marked(last[i].prompt, last[i].core),
            "note": _core_note(last[i]),
            "strips": [
                strip((f"iteration {step}", f"score {short(member.score)}"), member, top, verdict=verdict(member))
                for step, member in shown_at
            ],
        }

    return {
        "problem": problem,
        "end": scale_end(top, max(float(s.weights.max()) for s in shown.values())),
        "uniform": f"{100 / top:.1f}",
        "groups": [
            {"title": title, "note": note, "samples": [sample(i) for i in members]}
            for title, note, members in choose(first if len(steps) > 1 else (), last)
        ],
        "support": _support(samples),
    }


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


def marked(text: str, phrases: Sequence[str]) -> list[tuple[str, bool]]:
    """Pieces of the text, and whether each is one of the phrases, wherever they stand as written."""
    lower = text.lower()
    covered = [False] * len(text)
    for phrase in {p.lower() for p in phrases if p.strip()}:
        start = lower.find(phrase)
        while start >= 0:
            covered[start : start + len(phrase)] = [True] * len(phrase)
            start = lower.find(phrase, start + len(phrase))
    pieces: list[tuple[str, bool]] = []
    begin = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or covered[end] != covered[begin]:
            pieces.append((text[begin:end], covered[begin]))
            begin = end
    return pieces


def _core_note(sample: MapSample) -> str:
    if not sample.core:
        return "no core phrase was recorded"
    hidden = [phrase for phrase in sample.core if phrase.lower() not in sample.prompt.lower()]
    return "core phrases are marked" + (f"; also: {', '.join(hidden)}" if hidden else "")


def strip(labels: Sequence[str], sample: MapSample, top: float, *, verdict: bool | None = None) -> Mapping[str, Any]:
    """One sample: a column per denoising step; a phone shows few of them.

    Args:
        labels: lines that say what it is.
        top: the weight at the top of the colour scale.
        verdict: whether the finished image passes, for its frame.
    """
    recorded = max(1 if sample.clean is None else len(sample.clean), len(sample.sigmas) - 1)
    steps = len(sample.weights) if len(sample.weights) > 1 else recorded
    shown = spread(steps, _COLUMNS)
    few = {shown[i] for i in spread(len(shown), _FEW)}
    uneven = any(abs(float(w.mean()) - 1) > 0.02 for w in sample.weights)

    def column(step: int) -> Mapping[str, Any]:
        weights = sample.weights[min(step, len(sample.weights) - 1)]
        has_clean = sample.clean is not None and step < len(sample.clean)
        image = sample.clean[step] if sample.clean is not None and has_clean else sample.final
        picture, over = small_pair(image, weights, top=top, side=_SIDE)
        style = "" if step in few else "extra"
        largest = short(float(weights.max()))
        return {
            "step": step,
            "extra": step not in few,
            "sigma": f"σ {sample.sigmas[step]:.2f}" if step < len(sample.sigmas) else "",
            "mean": f"mean {float(weights.mean()):.2f}" if uneven else "",
            "clean": embedded(picture, f"clean prediction at step {step}", style=style) if has_clean else None,
            "weight": embedded(over, f"weights at step {step}, largest {largest}", style=style),
        }

    return {
        "labels": labels,
        "columns": [column(step) for step in shown],
        "few": len(few) + 1,
        "width": f"{90 + 116 * (len(shown) + 1)}px",
        "foreseen": sample.clean is not None,
        "final": embedded(sample.final, "finished image", side=_SIDE, style=FRAMES[verdict]),
        "note": f"{len(shown)} of {steps} steps shown." if steps > len(shown) else "",
    }


def _support(samples: Mapping[int, Sequence[MapSample]]) -> Mapping[str, str] | None:
    """How concentrated the maps are, per step."""
    steps = sorted(samples)
    series = []
    for i, step in enumerate(dict.fromkeys((steps[0], steps[-1]))):
        group = [s.weights for s in samples[step]]
        if len({w.shape for w in group}) != 1 or group[0].shape[0] < 2:
            continue
        support = torch.nanmean(torch.stack([effective_support(w) for w in group]), dim=0).tolist()
        series.append(Series(label=f"iteration {step}", x=range(len(support)), y=support, colour=i))
    if not series:
        return None
    return two_sizes(
        series, width=560, height=240, x_label="denoising step", y_label="share of the image", y_range=(0.0, 1.0)
    )
