"""Stopping without losing work: Ctrl-C, SIGTERM or SIGHUP ends the run after the iteration under way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class GracefulStop:
    """Turns SIGINT, SIGTERM and SIGHUP into a flag while its block runs; a second SIGINT is a KeyboardInterrupt.

    The handlers in force before are put back on leaving. Python delivers signals to the main thread only, so
    in any other thread the block changes nothing and `requested` stays False.

    Attributes:
        requested: whether to stop at the next safe point.
        reason: name of the first signal ("SIGINT"), or "".
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            self.reason = signal.Signals(number).name
            # os.write, because a print interrupted by this very handler must not be entered again.
            with contextlib.suppress(OSError):  # the terminal may be what went away
                os.write(2, f"\n{self.reason}: stopping after this iteration; Ctrl-C again stops at once.\n".encode())
