"""The rules of GenEval on detections: what the benchmark calls correct, and the peers' dense training score.

Written anew from the behaviour of `evaluation/evaluate_images.py` of github.com/djghosh13/geneval (MIT) and
of `reward_server/gen_eval.py` of github.com/yifan123/reward-server. No model lives here: objects come in as
boxes with scores, colours through a function.

A prompt is a mapping with a `tag`, the clauses to `include` (class, count, and either a color or a position,
which is a relation and the number of the clause it refers to) and, for counting, the clauses to `exclude`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, get_args

import attrs

CLASSES: Final = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag",
    "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog",
    "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv",
    "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier",
    "toothbrush",
)  # fmt: skip
"""COCO's 80 classes in COCO's order, under GenEval's names. Map a detector by index: hubs rename three."""

COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS: Final = ("left of", "right of", "above", "below")
TAGS: Final = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six categories; the overall score is the plain mean of their accuracies."""

THRESHOLD: Final = 0.3
COUNTING_THRESHOLD: Final = 0.9
MAX_OBJECTS: Final = 16
"""Detections kept per class."""
REACH: Final = 0.1
"""Share of the two objects' joint size by which their centres must differ before a relation is read off."""

Box = tuple[float, float, float, float]
Rule = Literal["dense", "dense_peers", "strict", "official"]
RULES: Final[tuple[Rule, ...]] = get_args(Rule)
Judgement = Literal["right", "surplus", "wrong colour", "wrong place"]


@attrs.frozen(kw_only=True)
class Detection:
    """One object that a detector found.

    Attributes:
        box: (x1, y1, x2, y2) in pixels, y downwards.
        score: confidence in [0, 1].
        index: its row in the detector's output, for its mask.
    """

    box: Box
    score: float
    index: int = 0


Objects = Mapping[str, Sequence[Detection]]
"""Class -> what was found of it, the most confident first."""
ColourOf = Callable[[Detection, str], str]
"""(object, its class) -> one of COLOURS."""


@attrs.frozen(kw_only=True)
class Verdict:
    """What a rule says about one image.

    Attributes:
        correct: whether everything the rule asks for holds.
        score: in [-14, 1]; 0 or 1 under "official" and "strict".
        reasons: what is wrong, in words; empty when correct.
    """

    correct: bool
    score: float
    reasons: tuple[str, ...] = ()


def keep_confident(
    candidates: Objects,
    tag: str,
    *,
    threshold: float = THRESHOLD,
    counting_threshold: float = COUNTING_THRESHOLD,
) -> dict[str, list[Detection]]:
    """The detections that count: above the threshold of the prompt's tag, at most 16 per class, best first.

    The official code also has non-maximum suppression and ships with it switched off; so there is none here.
    """
    least = counting_threshold if tag == "counting" else threshold
    kept = {
        name: sorted((d for d in detections if d.score > least), key=lambda d: -d.score)[:MAX_OBJECTS]
        for name, detections in candidates.items()
    }
    return {name: detections for name, detections in kept.items() if detections}


def relations(a: Box, b: Box) -> frozenset[str]:
    """Where box `a` is, seen from box `b`: none, one or two of RELATIONS."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    size = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - REACH * s, 0.0), o) for o, s in zip(offset, size, strict=True)]
    if all(abs(value) < 1e-3 for value in beyond):
        return frozenset()
    dx, dy = (value / math.hypot(*offset) for value in beyond)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return frozenset(name for name, true in holds.items() if true)


def all_related(relation: str, detections: Sequence[Detection], targets: Sequence[Detection]) -> bool:
    """Whether every pair of a found object and a target satisfies the relation."""
    return all(relation in relations(a.box, b.box) for a in detections for b in targets)


def official(objects: Objects, prompt: Mapping[str, Any], colour_of: ColourOf) -> Verdict:
    """The benchmark: at least `count` of each class; colour and place checked on the most confident ones.

    More objects than asked for are wrong only where an `exclude` clause says so (counting).
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in prompt.get("include", ()):
        name, count = clause["class"], clause["count"]
        detections = objects.get(name, ())[:count]
        wrong = None
        if len(detections) < count:
            wrong = f"expected {count} or more {name}, found {len(detections)}"
        elif "color" in clause and (hits := _hits(detections, clause, colour_of)) < count:
            wrong = f"expected {count} {clause['color']} {name}, found {hits}"
        elif "position" in clause:
            wrong = _misplaced(detections, clause, groups)
        reasons += [wrong] if wrong else []
        groups.append(None if wrong else detections)
    for clause in prompt.get("exclude", ()):
        if (observed := len(objects.get(clause["class"], ()))) >= clause["count"]:
            reasons.append(f"expected fewer than {clause['count']} {clause['class']}, found {observed}")
    return Verdict(correct=not reasons, score=float(not reasons), reasons=tuple(reasons))


def dense(objects: Objects, prompt: Mapping[str, Any], colour_of: ColourOf, *, repeat_defect: bool = False) -> Verdict:
    """What the peers train on: the mean over parts of the prompt; counts must be exact.

    A clause has a part for its count, `1 - |count - found| / count`, which is negative for many extras, and
    one for its colour or place; the latter is 0 when the count is wrong. Exact counts cover `exclude`.

    Args:
        repeat_defect: add the stray 1.0 that the peers' code appends after a failed place: a wrong place then
            costs a quarter of a two-object prompt instead of a third. For comparisons with their curves.

    Returns:
        `correct` is the peers' strict reward, `score` their dense one.
    """
    parts: list[float] = []
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in prompt.get("include", ()):
        name, count = clause["class"], clause["count"]
        detections = objects.get(name, ())
        wrong = None
        parts.append(_closeness(count, len(detections)))
        if len(detections) != count:
            wrong = f"expected exactly {count} {name}, found {len(detections)}"
            parts += [0.0] if "color" in clause or "position" in clause else []
        else:
            if "color" in clause:
                hits = _hits(detections, clause, colour_of)
                parts.append(_closeness(count, hits))
                wrong = None if hits == count else f"expected {count} {clause['color']} {name}, found {hits}"
            if "position" in clause and not wrong:
                target_found = groups[clause["position"][1]] is not None
                wrong = _misplaced(detections, clause, groups)
                parts.append(0.0 if wrong else 1.0)
                parts += [1.0] if repeat_defect and wrong and target_found else []
        reasons += [wrong] if wrong else []
        groups.append(None if wrong else detections)
    mean = sum(parts) / len(parts) if parts else 0.0
    return Verdict(correct=not reasons, score=mean, reasons=tuple(reasons))


def score(rule: Rule, objects: Objects, prompt: Mapping[str, Any], colour_of: ColourOf) -> Verdict:
    """Apply the named rule."""
    if rule == "official":
        return official(objects, prompt, colour_of)
    verdict = dense(objects, prompt, colour_of, repeat_defect=rule == "dense_peers")
    return attrs.evolve(verdict, score=float(verdict.correct)) if rule == "strict" else verdict


def needing_colour(objects: Objects, prompt: Mapping[str, Any], *, everything: bool) -> list[tuple[Detection, str]]:
    """The (object, class) pairs whose colour a rule will ask for, or with `everything` also the regions."""
    pairs: dict[tuple[str, int], tuple[Detection, str]] = {}
    for clause in prompt.get("include", ()):
        if "color" in clause:
            name, count = clause["class"], clause["count"]
            detections = objects.get(name, ())
            requested = detections if everything else detections[:count] if len(detections) >= count else ()
            pairs |= {(name, d.index): (d, name) for d in requested}
    return list(pairs.values())


def judge_objects(
    objects: Objects, prompt: Mapping[str, Any], colour_of: ColourOf, rule: Rule
) -> list[tuple[Detection, str, Judgement]]:
    """Every object of a named class with what is right or wrong about it.

    The most confident `count` objects of the right colour are right, unless they stand in the wrong place;
    further ones are surplus. Under "official" a surplus object that no `exclude` clause forbids neither helps
    nor hurts and is left out. An object that several clauses claim gets the kindest judgement.
    """
    forbidden = {clause["class"] for clause in prompt.get("exclude", ())}
    kindness = ("wrong place", "surplus", "wrong colour")
    judged: dict[tuple[str, int], tuple[Detection, str, Judgement]] = {}
    groups: list[Sequence[Detection]] = []
    for clause in prompt.get("include", ()):
        name, count = clause["class"], clause["count"]
        detections = objects.get(name, ())
        fitting = [d for d in detections if "color" not in clause or colour_of(d, name) == clause["color"]]
        chosen = fitting[:count]
        for d in detections:
            judgement: Judgement = "right" if d in chosen else "surplus" if d in fitting else "wrong colour"
            if judgement == "right" and "position" in clause:
                relation, target = clause["position"]
                judgement = "right" if all_related(relation, [d], groups[target]) else "wrong place"
            if judgement == "surplus" and rule == "official" and name not in forbidden:
                continue
            before = judged.get((name, d.index))
            if before is None or _rank(judgement, kindness) < _rank(before[2], kindness):
                judged[name, d.index] = (d, name, judgement)
        groups.append(chosen)
    return list(judged.values())


def check_prompt(prompt: Mapping[str, Any]) -> None:
    """Refuse task data that the rules cannot read.

    Raises:
        ValueError: naming the value and what is known.
    """
    clauses = [*prompt.get("include", ()), *prompt.get("exclude", ())]
    if prompt.get("tag") not in TAGS or not prompt.get("include"):
        raise ValueError(
            f"GenEval metadata {dict(prompt)!r}: it needs a tag of {', '.join(TAGS)} and at least one clause "
            "under 'include'."
        )
    for number, clause in enumerate(clauses):
        if clause.get("class") not in CLASSES:
            raise ValueError(f"GenEval clause {clause!r}: the class is none of COCO's 80, such as {CLASSES[0]!r}.")
        if not isinstance(clause.get("count"), int) or clause["count"] < 1:
            raise ValueError(f"GenEval clause {clause!r}: 'count' must be a whole number of at least 1.")
        if "color" in clause and clause["color"] not in COLOURS:
            raise ValueError(f"GenEval clause {clause!r}: the color is not one of {', '.join(COLOURS)}.")
        if "position" in clause:
            relation, target = clause["position"]
            if relation not in RELATIONS or not 0 <= target < number:
                raise ValueError(
                    f"GenEval clause {clause!r}: a position is one of {', '.join(RELATIONS)} and the "
                    "number of an earlier clause."
                )


def _closeness(wanted: int, count: int) -> float:
    return 1 - abs(wanted - count) / wanted


def _hits(detections: Sequence[Detection], clause: Mapping[str, Any], colour_of: ColourOf) -> int:
    return sum(colour_of(d, clause["class"]) == clause["color"] for d in detections)


def _misplaced(
    detections: Sequence[Detection], clause: Mapping[str, Any], groups: Sequence[Sequence[Detection] | None]
) -> str | None:
    relation, target = clause["position"]
    targets = groups[target]
    if targets is None:
        return f"no target for {clause['class']} to be {relation}"
    return None if all_related(relation, detections, targets) else f"expected {clause['class']} {relation} target"


def _rank(judgement: str, kindness: tuple[str, ...]) -> int:
    return -1 if judgement == "right" else kindness.index(judgement)
