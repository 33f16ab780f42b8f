"""A curve as a mapping from iterations to values, between and at its points."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TypeVar

Trial = tuple[str, int]
"""(arm, seed)."""
Curve = Mapping[int, float]
Step = TypeVar("Step", int, float)


def area(curve: Mapping[Step, float]) -> float:
    """Mean height of a curve by the trapezoid rule."""
    steps = sorted(curve)
    if len(steps) < 2:
        return curve[steps[0]]
    return sum((curve[a] + curve[b]) / 2 * (b - a) for a, b in pairwise(steps)) / (steps[-1] - steps[0])


def at(curve: Curve, iteration: float) -> float:
    """A curve between its points, by straight lines; its ends hold beyond them."""
    steps = sorted(curve)
    for a, b in pairwise(steps):
        if a <= iteration <= b:
            return curve[a] + (curve[b] - curve[a]) * (iteration - a) / (b - a)
    return curve[steps[0]] if iteration < steps[0] else curve[steps[-1]]


def until(curve: Curve, iteration: float) -> dict[float, float]:
    """The part of a curve up to an iteration, with its value there."""
    part: dict[float, float] = {step: value for step, value in curve.items() if step < iteration}
    return part | {iteration: at(curve, iteration)}
