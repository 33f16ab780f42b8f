"""Ticks and numbers for charts and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """About `target` round numbers (1, 2 or 5 times a power of ten) that lie within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, target)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((m for m in (1, 2, 5, 10) if m * power >= raw * 0.999), default=10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def integer_ticks(low: float, high: float, target: int = 6) -> list[float]:
    """Like `nice_ticks`, but whole numbers: there is no update 2.5."""
    return [tick for tick in nice_ticks(low, high, target) if tick == round(tick)] or [float(round(low))]


def padded(values: Sequence[float], *, from_zero: bool, share: float = 0.06) -> tuple[float, float]:
    """A range that holds all values with some air; a constant gets a range around it."""
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high == low:
        air = abs(high) * 0.1 or 1.0
        return (low - air, high + air) if high else (0.0, 1.0)
    air = (high - low) * share
    return (low if from_zero and low == 0 else low - air), (high if from_zero and high == 0 else high + air)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels with as many decimals as their spacing needs; powers of ten where decimals would not do."""
    largest = max(abs(tick) for tick in ticks)
    step = min((b - a for a, b in pairwise(ticks)), default=largest) or 1.0
    if largest >= 1e5 or step < 1e-3:
        return ["0" if tick == 0 else short(tick, 2) for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if len(ticks) > 1 else 2
    return [minus(f"{tick:.{decimals}f}") for tick in ticks]


def short(value: float, digits: int = 3) -> str:
    """A number as people write it: 0.47, 12.3, 4.1e−7."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else minus(str(value))
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return minus(f"{mantissa}e{int(exponent)}")
    return minus(f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}")


def two(value: float) -> str:
    """Two decimals for shares, so that columns line up; four figures for everything else."""
    return f"{value:.2f}" if 0 <= value <= 1 else short(value, 4)


def signed(value: float, decimals: int = 2) -> str:
    """+0.19, −0.03; a difference that rounds to zero has no sign."""
    text = f"{value:+.{decimals}f}"
    return minus(text if float(text) else text[1:])


def minus(text: str) -> str:
    """A hyphen is not a minus sign."""
    return text.replace("-", "−")


def seconds(value: float) -> str:
    """0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 60:
        return f"{value:.0f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
