"""What the terminal shows: a line that moves within a phase, and one line per iteration."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from torch import Tensor
from tqdm import tqdm

WIDTH = 160
"""Columns of a summary line, at most."""

HELD_OUT = ("eval/unseen/strict", "eval/strict", "eval/partial", "eval/reward")
"""Names of the held-out score; the first that was logged is shown."""


def _fixed(value: float | Tensor) -> str:
    """6 columns: up to 3 decimals, or the power of ten where those would show nothing or not fit."""
    value = float(value)
    texts = [f"{value:6.{decimals}f}" for decimals in (3, 2, 1, 0)]
    fitting = [text for text in texts if len(text) == 6]
    small = 0 < abs(value) < 0.0005
    return fitting[0] if fitting and not small else f"{value:6.0e}"


def _scientific(value: float | Tensor) -> str:
    return f"{float(value):7.1e}"


_COLUMNS = (
    ("reward/mean", "reward", _fixed),
    ("reward/spread", "spread", _fixed),
    ("clip/low", "clip", _fixed),
    ("ratio/abs_minus_one_max", "|r-1|", _scientific),
    ("grad_norm", "grad", _fixed),
    ("kl/base", "KL", _scientific),
    ("map/entropy", "entropy", _fixed),
)
_PHASES = "seconds/"


class Progress:
    """Shows how far a phase is, on one line that is erased at its end; silent unless it is a terminal.

    Args:
        stream: where to write; standard error by default.
        interval: seconds between two drawings, at least.
    """

    def __init__(self, stream: TextIO | None = None, *, interval: float = 0.1) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Yields `advance(count)`, to be called after every finished piece of the phase."""
        with tqdm(
            desc=f"{name:<8}",
            total=total or None,
            file=self._stream,
            disable=not self._stream.isatty(),
            leave=False,
            mininterval=self._interval,
            dynamic_ncols=True,
        ) as bar:

            def advance(count: int = 1) -> None:
                bar.update(count)

            yield advance


def summary_line(iteration: int, metrics: Mapping[str, float | Tensor]) -> str:
    """One iteration in one line of at most `WIDTH` columns; lines of the same metrics align.

    Shows, where logged: reward, spread within a group, share clipped below / above, |ratio - 1|, gradient
    norm, KL to the base, map entropy, seconds in all and of the longest phases that fit, and the held-out
    score.
    """
    parts = [f"#{iteration:<5}"]
    for key, label, number in _COLUMNS:
        if key == "clip/low" and "clip/high" in metrics and key in metrics:
            low, high = 100 * float(metrics[key]), 100 * float(metrics["clip/high"])
            parts.append(f"{label} {low:5.1f}/{high:5.1f}%")
        elif key in metrics:
            parts.append(f"{label} {number(metrics[key])}")
    held_out = next((f"  held-out {_fixed(metrics[k])}" for k in HELD_OUT if k in metrics), "")
    line = "  ".join(parts)
    seconds = {k.removeprefix(_PHASES): float(v) for k, v in metrics.items() if k.startswith(_PHASES)}
    seconds.pop("total", None)
    if not seconds:
        return line + held_out
    line += f"  {sum(seconds.values()):.1f} s:"
    shown: set[str] = set()
    for name in sorted(seconds, key=lambda name: -seconds[name]):
        if len(line + _phases(seconds, shown | {name}) + held_out) <= WIDTH:
            shown.add(name)
    return line + _phases(seconds, shown) + held_out


def _phases(seconds: Mapping[str, float], shown: set[str]) -> str:
    return "".join(f" {name} {spent:.1f}" for name, spent in seconds.items() if name in shown)
