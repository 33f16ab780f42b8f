"""Numbers as people write them."""

from __future__ import annotations

import math


def short(value: float, digits: int = 3) -> str:
    """0.47, 12.3, 4.1e−7."""
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


def count(number: float, noun: str) -> str:
    """1 image, 2 images."""
    return f"{int(number)} {noun}" + ("" if int(number) == 1 else "s")


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
