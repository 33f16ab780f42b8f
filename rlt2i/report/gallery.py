"""Before and after at equal seeds, category by category."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlt2i.report.numbers import count, short, signed
from rlt2i.report.pictures import TINY, data_uri, thumbnail
from rlt2i.report.rundir import PASS, EvalImages, has_pass_mark
from rlt2i.report.summary import outcomes, same_prompts

_FIRST, _CHANGED = 6, 6
_PHOTO_SIDE = 200
FRAMES = {True: "framed pass", False: "framed fail", None: "framed"}
_KINDS = {
    (True, True): ("right", "✓ right"),
    (False, True): ("fixed", "✓ fixed"),
    (True, False): ("broken", "✗ broken"),
    (False, False): ("wrong", "✗ wrong"),
}


def gallery(pair: tuple[EvalImages, EvalImages] | None, problem: str) -> Mapping[str, Any]:
    """The section's pictures and numbers; `problem` says why there is no pair, or what else could not be read."""
    if pair is not None and not same_prompts(*pair):
        before, after = pair
        problem = (
            f"{before.path.name} and {after.path.name} hold different prompts, so their images cannot be "
            "compared one by one."
        )
        pair = None
    if pair is None:
        return {"problem": problem, "categories": []}
    before, after = pair
    marked = has_pass_mark([*before.scores, *after.scores])
    rows: dict[str, list[int]] = {}
    for i, category in enumerate(after.categories):
        rows.setdefault(category, []).append(i)
    return {
        "problem": problem,
        "before": before.step,
        "after": after.step,
        "marked": marked,
        "balance": _balance(before, after),
        "categories": [_category(before, after, name, members, marked=marked) for name, members in rows.items()],
    }


def _balance(before: EvalImages, after: EvalImages) -> list[tuple[str, str, int]]:
    counts = outcomes(before, after)
    pictures = [
        ("right", "right before and after", len(counts.right_indices)),
        ("fixed", "fixed: failed before, passes now", counts.fixed),
        ("broken", "broken: passed before, fails now", counts.broken),
        ("wrong", "wrong before and after", len(counts.wrong_indices)),
    ]
    return pictures if counts.total else []


def _category(
    before: EvalImages, after: EvalImages, name: str, rows: Sequence[int], *, marked: bool
) -> Mapping[str, Any]:
    shown = rows[:_FIRST]
    counts = outcomes(before, after, rows)
    if marked:
        note = (
            f"{count(len(rows), 'image')}: {counts.fixed} fixed, {counts.broken} broken, "
            f"{len(counts.right_indices)} right and {len(counts.wrong_indices)} wrong both times"
        )
        lists = [("Fixed", counts.fixed_indices), ("Broken", counts.broken_indices)]
    else:
        gains = {i: after.scores[i] - before.scores[i] for i in rows}
        known = [i for i in rows if math.isfinite(gains[i])]
        mean = sum(gains[i] for i in known) / len(known) if known else math.nan
        note = f"{count(len(rows), 'image')}, mean change {signed(mean)}"
        ranked = sorted(known, key=gains.__getitem__)
        lists = [
            ("Largest rises", [i for i in reversed(ranked) if gains[i] > 0]),
            ("Largest falls", [i for i in ranked if gains[i] < 0]),
        ]
    groups = [(f"The first {len(shown)}", "not chosen by result", shown)]
    for title, members in lists:
        more = [i for i in members if i not in shown][:_CHANGED]
        text = f"{len(more)} more of {len(members)}" if marked else f"{len(more)} more, chosen by result"
        groups += [(title, text, more)] if more else []
    return {
        "name": name,
        "note": note,
        "groups": [
            {"title": title, "note": text, "pairs": [_pair(before, after, i, marked=marked) for i in members]}
            for title, text, members in groups
        ],
    }


def _pair(before: EvalImages, after: EvalImages, i: int, *, marked: bool) -> Mapping[str, Any]:
    a, b = (e.scores[i] >= PASS if marked and math.isfinite(e.scores[i]) else None for e in (before, after))
    kind, badge = _KINDS[a, b] if a is not None and b is not None else ("", "")
    plain = kind and {before.scores[i], after.scores[i]} <= {0.0, 1.0}
    return {
        "kind": kind,
        "badge": badge,
        "prompt": after.prompts[i],
        "scores": "" if plain else f"{short(before.scores[i])} → {short(after.scores[i])}",
        "before": _framed(before, i, a),
        "after": _framed(after, i, b),
        "notes": _notes(before.notes[i], after.notes[i], a, b),
    }


def _notes(before: str, after: str, passed_before: bool | None, passes: bool | None) -> list[str]:
    """Why an image fails: what the reward told of the newest one that does."""
    if passes is False:
        return [after] if after else []
    return [f"before, {before}"] if passed_before is False and before else []


def _framed(images: EvalImages, i: int, verdict: bool | None) -> Mapping[str, Any]:
    sign = {True: " (passes)", False: " (fails)", None: ""}[verdict]
    return embedded(images.image(i), f"iteration {images.step}: {images.prompts[i]}{sign}", style=FRAMES[verdict])


def embedded(image: Tensor, alt: str, *, style: str = "", side: int = _PHOTO_SIDE) -> Mapping[str, Any]:
    """An image [3, H, W] within the page: tiny ones keep their pixels and are enlarged by the browser."""
    image = thumbnail(image, side)
    kind = "pixels" if max(image.shape[1:]) <= TINY else "photo"
    return {
        "src": data_uri(image),
        "alt": alt,
        "width": image.shape[2],
        "height": image.shape[1],
        "style": f"{kind} {style}".strip(),
    }
