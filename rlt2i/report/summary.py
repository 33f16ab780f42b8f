"""What a run came to, in numbers and in one sentence that the numbers carry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import attrs

from rlt2i.report.numbers import count, short, signed, two
from rlt2i.report.rundir import PASS, EvalImages, Row, Run, has_pass_mark

_UNSEEN, _SEEN = "unseen/", "seen/"
"""Of prompts that were never trained on, and of those that were, where an evaluation holds both."""
_PRIMARY = ("unseen/strict", "strict", "unseen/partial", "partial", "unseen/reward", "reward")
_NAMES = {"strict": "strict accuracy", "partial": "partial score", "reward": "reward"}
_NOT_CATEGORIES = frozenset({*_PRIMARY, "objects", "objects_asked", "images", "count", "seconds"})
_SUFFIXES = ("_low", "_high", "_gain", "_se", "_std", "_count")
_OBJECT_DRIFT = 0.10


@attrs.frozen(kw_only=True)
class Gain:
    """A paired difference to the base with its 95 % interval; nan bounds when nothing carries one.

    `source` says where it comes from when the trainer did not log it.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    source: str = ""

    @property
    def text(self) -> str:
        if math.isnan(self.low):
            return signed(self.value)
        return f"{signed(self.value)} {self.bounds}"

    @property
    def bounds(self) -> str:
        return f"[{signed_bound(self.low)}, {signed_bound(self.high)}]"

    @property
    def verdict(self) -> str:
        """What may be said about it."""
        if math.isnan(self.low):
            return "No interval was recorded, so chance cannot be ruled out."
        if self.low > 0:
            return "The 95 % interval lies above zero: on these prompts this run made the model better."
        if self.high < 0:
            return "The 95 % interval lies below zero: on these prompts this run made the model worse."
        return "The 95 % interval includes zero: not distinguishable from no change."


def signed_bound(value: float) -> str:
    """Bounds of an interval: a sign only where it is needed."""
    return signed(value).lstrip("+")


@attrs.frozen(kw_only=True)
class Headline:
    """The top of the report.

    Attributes:
        sentence: the result.
        verdict: what may be concluded from it.
        warnings: what a reader must know before believing it.
        metric: key of the main metric without its prefix, or "".
        before, after, gain: its values; nan when there are none.
        first, last: the iterations they were measured at.
    """

    sentence: str
    verdict: str
    warnings: Sequence[str] = ()
    metric: str = ""
    before: float = math.nan
    after: float = math.nan
    gain: Gain = attrs.field(factory=lambda: Gain(value=math.nan))
    first: int = 0
    last: int = 0


def metric_name(metric: str) -> str:
    """What a metric is called in a sentence."""
    for prefix, which in ((_UNSEEN, "prompts never trained on"), (_SEEN, "prompts trained on")):
        if metric.startswith(prefix):
            return f"{metric_name(metric.removeprefix(prefix))} on {which}"
    return _NAMES.get(metric, metric.replace("_", " "))


def primary_metric(evals: Sequence[Row]) -> str:
    """The metric that the report is about: strict if logged, else partial, else reward; "" if none.

    Where some of the evaluation's prompts were trained on, that of the others.
    """
    return next((m for m in _PRIMARY if any(f"eval/{m}" in row for row in evals)), "")


def categories(evals: Sequence[Row]) -> list[str]:
    """Names behind eval/<category>, in the order of their first appearance."""
    names: dict[str, None] = {}
    for row in evals:
        for key in row:
            name = key.removeprefix("eval/")
            plain = key.startswith("eval/") and "/" not in name and not name.endswith(_SUFFIXES)
            if plain and name not in _NOT_CATEGORIES:
                names.setdefault(name)
    return list(names)


def headline(run: Run, images: tuple[EvalImages, EvalImages] | None) -> Headline:
    """The result, from the first and the last evaluation; `images` are theirs, if both were saved."""
    metric = primary_metric(run.evals)
    rows = [row for row in run.evals if math.isfinite(row.get(f"eval/{metric}", math.nan))]
    if not rows:
        return _without_evaluation(run)
    first, last = rows[0], rows[-1]
    before, after = first[f"eval/{metric}"], last[f"eval/{metric}"]
    if len(rows) == 1:
        return Headline(
            sentence=f"Held-out {metric_name(metric)} {short(before)} at iteration {int(first['step'])}.",
            verdict="There is one evaluation only, so nothing can be said about a change.",
            warnings=_warnings(run, first),
            metric=metric,
            before=before,
            after=before,
            first=int(first["step"]),
            last=int(first["step"]),
        )
    gain = paired_gain(metric, last, before, after, images)
    iterations = int(last["step"] - first["step"])
    parts = [f"Held-out {metric_name(metric)} {two(before)} → {two(after)} over {count(iterations, 'iteration')}"]
    parts.append(f"paired gain {gain.text}" if not math.isnan(gain.low) else f"gain {gain.text}")
    parts += _count(last, images, metric)
    if "eval/objects" in last:
        requested = f" vs {last['eval/objects_asked']:.2f} asked" if "eval/objects_asked" in last else ""
        parts.append(f"mean objects {last['eval/objects']:.2f}{requested}")
    return Headline(
        sentence=", ".join(parts) + ".",
        verdict=gain.verdict + (f" {gain.source}" if gain.source else ""),
        warnings=_warnings(run, last) + _late_base(int(first["step"])),
        metric=metric,
        before=before,
        after=after,
        gain=gain,
        first=int(first["step"]),
        last=int(last["step"]),
    )


def paired_gain(
    metric: str, last: Row, before: float, after: float, images: tuple[EvalImages, EvalImages] | None
) -> Gain:
    """The logged gain; without one, that of the saved images' verdicts; without those, no interval."""
    key = f"eval/{metric}_gain"
    if key in last:
        return Gain(value=last[key], low=last.get(f"{key}_low", math.nan), high=last.get(f"{key}_high", math.nan))
    if metric == "strict" and images is not None:
        counts = outcomes(*images)
        n = counts.total
        if n > 1 and n == min(len(images[0]), len(images[1])):
            mean = (counts.fixed - counts.broken) / n
            variance = ((counts.fixed + counts.broken) / n - mean * mean) * n / (n - 1)
            reach = 1.96 * math.sqrt(variance / n)
            if abs(mean - (after - before)) < 0.5 / n + 1e-6:
                return Gain(
                    value=mean,
                    low=mean - reach,
                    high=mean + reach,
                    source=f"(Interval computed from the {n} saved pairs of images; the run logged none.)",
                )
    return Gain(value=after - before)


@attrs.frozen(kw_only=True)
class Outcomes:
    """Pairs of images at equal seeds, by what training did to them; indices into both evaluations."""

    fixed_indices: Sequence[int]
    broken_indices: Sequence[int]
    right_indices: Sequence[int]
    wrong_indices: Sequence[int]

    @property
    def fixed(self) -> int:
        return len(self.fixed_indices)

    @property
    def broken(self) -> int:
        return len(self.broken_indices)

    @property
    def total(self) -> int:
        return self.fixed + self.broken + len(self.right_indices) + len(self.wrong_indices)


def outcomes(before: EvalImages, after: EvalImages, rows: Sequence[int] | None = None) -> Outcomes:
    """Sort pairs by verdict. Pairs without two valid scores are left out; scores need a pass mark."""
    rows = range(min(len(before), len(after))) if rows is None else rows
    kinds: dict[tuple[bool, bool], list[int]] = {(a, b): [] for a in (False, True) for b in (False, True)}
    if has_pass_mark([*before.scores, *after.scores]):
        for i in rows:
            if math.isfinite(before.scores[i]) and math.isfinite(after.scores[i]):
                kinds[before.scores[i] >= PASS, after.scores[i] >= PASS].append(i)
    return Outcomes(
        fixed_indices=kinds[False, True],
        broken_indices=kinds[True, False],
        right_indices=kinds[True, True],
        wrong_indices=kinds[False, False],
    )


def same_prompts(before: EvalImages, after: EvalImages) -> bool:
    """Whether the two evaluations may be compared image by image."""
    return list(before.prompts) == list(after.prompts)


def parts(recipe: Mapping[str, object]) -> list[tuple[str, str]]:
    """(role, name) of what an algorithm was composed of, whatever the recipe's exact dialect."""
    named = [(role, _part(recipe[role])) for role in _ROLES if role in recipe]
    nested = recipe.get("algorithm")
    if not named and isinstance(nested, dict):
        named = [(role, _part(nested[role])) for role in _ROLES if role in nested]
    return [(role, name) for role, name in named if name]


_ROLES = ("policy", "sampler", "reward", "credit", "objective")


def _part(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " × ".join(name for name in map(_part, value) if name)
    if isinstance(value, dict):
        if "product" in value:
            return _part(value["product"])
        if "advantage" in value:  # a composition reads as what it is composed of
            factors = [_part(value[key]) for key in ("advantage", "allocations", "masks") if value.get(key)]
            return " × ".join(name for name in factors if name)
        for key in ("type", "name", "part", "class", "kind", "use"):
            if isinstance(value.get(key), str):
                inner = _part(value.get("allocation"))
                return f"{value[key]}({inner})" if inner else str(value[key])
        return str(next(iter(value))) if len(value) == 1 else ""
    return ""


def _without_evaluation(run: Run) -> Headline:
    rows = [row for row in run.train if "reward/mean" in row]
    if len(rows) < 2:
        return Headline(sentence="No result yet.", verdict="The run has not logged an evaluation.")
    tenth = max(1, len(rows) // 10)
    start = sum(row["reward/mean"] for row in rows[:tenth]) / tenth
    end = sum(row["reward/mean"] for row in rows[-tenth:]) / tenth
    return Headline(
        sentence=f"Training reward {short(start)} → {short(end)} over {count(len(rows), 'iteration')}.",
        verdict="This is the reward on training prompts; no held-out evaluation was logged.",
    )


def _count(last: Row, images: tuple[EvalImages, EvalImages] | None, metric: str) -> list[str]:
    """How many images were scored; the saved ones may be fewer, so they are called so."""
    for key in ("eval/unseen/images",) if metric.startswith(_UNSEEN) else ("eval/images", "eval/count"):
        if key in last:
            return [count(last[key], "image")]
    return [count(len(images[1]), "saved image")] if images else []


def _warnings(run: Run, last: Row) -> list[str]:
    warnings = list(run.problems)
    objects, requested = last.get("eval/objects"), last.get("eval/objects_asked")
    if objects is not None and requested and abs(objects - requested) > _OBJECT_DRIFT * requested:
        more = "more" if objects > requested else "fewer"
        warnings.append(
            f"The images hold {objects:.2f} objects on average where the prompts ask for {requested:.2f}: "
            f"{more} than 10 % off. Look at the images below for reward hacking before you trust the score."
        )
    return warnings


def _late_base(first: int) -> list[str]:
    if first == 0:
        return []
    return [
        f"The first evaluation is of iteration {first}, not of the base model; the change before it is not counted."
    ]
