"""Seconds by phase of an iteration, and how far the phase under way has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
import torch

from rlt2i.runs.terminal import Progress


def _nothing(count: int) -> None:
    """Where no progress is shown."""


@attrs.define
class Stopwatch:
    """Seconds by phase, and a line on the terminal that shows how far each has come.

    Attributes:
        seconds: by phase; a phase may be entered many times.
        beside: seconds of work that other threads did meanwhile, by kind.
        device: whose queue is waited for before a phase counts as over.
        progress: where the line is drawn.
        advance: to be called after every finished piece of the phase under way.
    """

    seconds: dict[str, float] = attrs.field(factory=dict)
    beside: dict[str, float] = attrs.field(factory=dict)
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    progress: Progress = attrs.field(factory=Progress)
    advance: Callable[[int], None] = attrs.field(default=_nothing, init=False)

    @contextmanager
    def __call__(self, phase: str, total: int | None = None) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with self.progress.phase(phase, total) as self.advance:
                yield
        finally:
            self.advance = _nothing
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @contextmanager
    def work(self, kind: str) -> Iterator[None]:
        """In another thread, beside a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.beside[kind] = self.beside.get(kind, 0.0) + time.perf_counter() - start
