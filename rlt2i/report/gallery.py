"""Before and after at equal seeds, category by category."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from rlt2i.report.axes import short, signed
from rlt2i.report.html import Markup, h, join, missing, section
from rlt2i.report.pixels import data_uri, thumbnail, to_array
from rlt2i.report.rundir import PASS, EvalImages, has_pass_mark
from rlt2i.report.summary import Outcomes, outcomes, same_prompts

_FIRST = 6
_CHANGED = 6
_PHOTO_SIDE = 200
_TITLE = "Before and after"
_KINDS = (
    ("right", "right before and after"),
    ("fixed", "fixed: failed before, passes now"),
    ("broken", "broken: passed before, fails now"),
    ("wrong", "wrong before and after"),
)


def gallery(pair: tuple[EvalImages, EvalImages] | None, problem: str, run_name: str) -> Markup:
    """The section; `problem` says why there is no pair, or what else could not be read."""
    if pair is None:
        return section("images", _TITLE, missing(problem, f"rlt2i eval {run_name}"))
    before, after = pair
    if not same_prompts(before, after):
        text = (
            f"{before.path.name} and {after.path.name} hold different prompts, so their images cannot be "
            "compared one by one."
        )
        return section("images", _TITLE, missing(text, f"rlt2i eval {run_name}"))
    marked = has_pass_mark([*before.scores, *after.scores])
    intro = [h("p", problem, cls="warning")] if problem else []
    intro += [
        h(
            "p",
            f"Left: update {before.step}. Right: update {after.step}. The two images of a pair start from "
            "the same noise and the same prompt, so what differs is what training did.",
        )
    ]
    total = outcomes(before, after)
    if total.total:
        intro.append(_balance(total))
    by_category: dict[str, list[int]] = {}
    for i, category in enumerate(after.categories):
        by_category.setdefault(category, []).append(i)
    blocks = [_category(before, after, name, rows, marked=marked) for name, rows in by_category.items()]
    return section("images", _TITLE, *intro, *blocks)


def _balance(counts: Outcomes) -> Markup:
    sizes = {
        "right": len(counts.right_indices),
        "fixed": counts.fixed,
        "broken": counts.broken,
        "wrong": len(counts.wrong_indices),
    }
    bar = join(
        h("span", cls=f"bg-{kind}", style=f"flex: {sizes[kind]}", title=f"{sizes[kind]} {label}")
        for kind, label in _KINDS
        if sizes[kind]
    )
    key = join(h("li", h("i", cls=f"bg-{kind}"), f"{sizes[kind]} {label}") for kind, label in _KINDS)
    return join((h("div", bar, cls="stack"), h("ul", key, cls="key")))


def _category(before: EvalImages, after: EvalImages, name: str, rows: Sequence[int], *, marked: bool) -> Markup:
    shown = rows[:_FIRST]
    body = [
        h("h4", f"The first {len(shown)}", h("small", "not chosen by result")),
        _pairs(before, after, shown, marked=marked),
    ]
    counts = outcomes(before, after, rows)
    if marked:
        note = (
            f"{len(rows)} images: {counts.fixed} fixed, {counts.broken} broken, "
            f"{len(counts.right_indices)} right and {len(counts.wrong_indices)} wrong both times"
        )
        lists = [("Fixed", counts.fixed_indices), ("Broken", counts.broken_indices)]
    else:
        gains = {i: after.scores[i] - before.scores[i] for i in rows}
        known = [i for i in rows if math.isfinite(gains[i])]
        mean = sum(gains[i] for i in known) / len(known) if known else math.nan
        note = f"{len(rows)} images, mean change {signed(mean)}"
        ranked = sorted(known, key=gains.__getitem__)
        lists = [
            ("Largest rises", [i for i in reversed(ranked) if gains[i] > 0]),
            ("Largest falls", [i for i in ranked if gains[i] < 0]),
        ]
    for title, members in lists:
        more = [i for i in members if i not in shown][:_CHANGED]
        if more:
            text = f"{len(more)} more of {len(members)}" if marked else f"{len(more)} more, chosen by result"
            body += [h("h4", title, h("small", text)), _pairs(before, after, more, marked=marked)]
    return h("details", h("summary", name, h("small", note)), *body, open="open")


def _pairs(before: EvalImages, after: EvalImages, rows: Sequence[int], *, marked: bool) -> Markup:
    return h("div", *(_pair(before, after, i, marked=marked) for i in rows), cls="pairs")


def _pair(before: EvalImages, after: EvalImages, i: int, *, marked: bool) -> Markup:
    a, b = (_verdict(e.scores[i], marked) for e in (before, after))
    scores = f"{short(before.scores[i])} → {short(after.scores[i])}"
    kind, text = {
        (False, True): ("fixed", "✓ fixed"),
        (True, False): ("broken", "✗ broken"),
        (True, True): ("right", "✓ right"),
        (False, False): ("wrong", "✗ wrong"),
    }.get((a, b), ("", "")) if a is not None and b is not None else ("", "")  # fmt: skip
    caption = [after.prompts[i], Markup("<br>")]
    caption += [h("span", text, cls=f"badge {kind}"), " "] if kind else []
    if not kind or not {before.scores[i], after.scores[i]} <= {0.0, 1.0}:
        caption.append(h("span", scores, cls="quiet"))
    return h(
        "figure",
        h(
            "div",
            picture(before, i, f"update {before.step}: {before.prompts[i]}", a),
            picture(after, i, f"update {after.step}: {after.prompts[i]}", b),
            cls="images",
        ),
        h("figcaption", *caption),
        cls=f"pair {kind}".strip(),
    )


def picture(images: EvalImages, i: int, alt: str, verdict: bool | None) -> Markup:
    """One framed image."""
    frame = {True: "framed pass", False: "framed fail", None: "framed"}[verdict]
    sign = {True: " (passes)", False: " (fails)", None: ""}[verdict]
    return embed(Image.fromarray(to_array(images.image(i))), alt + sign, extra=frame)


def embed(image: Image.Image, alt: str, *, extra: str = "", side: int = _PHOTO_SIDE) -> Markup:
    """An image within the page: tiny ones keep their pixels and are enlarged by the browser."""
    image = thumbnail(image, side)
    kind = "pixels" if max(image.size) <= 96 else "photo"
    return h(
        "img",
        src=data_uri(image),
        alt=alt,
        width=image.width,
        height=image.height,
        cls=f"{kind} {extra}".strip(),
    )


def _verdict(score: float, marked: bool) -> bool | None:
    return score >= PASS if marked and math.isfinite(score) else None
