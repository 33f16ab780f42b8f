"""Stopping without losing work: Ctrl-C, SIGTERM or SIGHUP ends the run after the iteration under way."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

PATIENCE = 5.0
"""Seconds after a second Ctrl-C in which Python must have heard of it; else the process is ended from outside."""


class GracefulStop:
    """Turns SIGINT, SIGTERM and SIGHUP into a flag while its block runs; a second SIGINT is a KeyboardInterrupt.

    Python hears of a signal between two of its own instructions. Where it is stuck in foreign code (a kernel that hangs
    or a library), a thread that the system tells of signals ends the process after a second SIGINT, without
    saving; only code that never lets go of Python's lock is out of its reach. A third SIGINT ends the process at
    once, whatever code is swallowing exceptions.

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
        self._left = threading.Event()
        self._wakeup: tuple[int, int, int] | None = None

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in _NUMBERS:
                self._previous[number] = signal.signal(number, self._handle)
            read, write = os.pipe()
            os.set_blocking(write, False)
            self._wakeup = (read, write, signal.set_wakeup_fd(write, warn_on_full_buffer=False))
            threading.Thread(target=self._watch, args=(read,), daemon=True, name="signals").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._wakeup is not None:
            _, write, before = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(write)  # ends the watching thread
            self._wakeup = None
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            self.reason = signal.Signals(number).name
            _tell(f"\n{self.reason}: stopping after this iteration; Ctrl-C again stops at once.\n")

    def _watch(self, descriptor: int) -> None:
        """Ends the process where the main thread does not hear a second SIGINT."""
        interrupts = 0
        with open(descriptor, "rb", buffering=0) as stream:
            while numbers := stream.read(64):
                interrupts += numbers.count(signal.SIGINT)
                if interrupts > 1 and not self._left.wait(PATIENCE) and self._interrupts < 2:
                    _tell("stuck in foreign code, so it is ended from outside; resume from the last checkpoint.\n")
                    os._exit(130)


def _tell(text: str) -> None:
    # os.write, because a print interrupted by a handler must not be entered again.
    with contextlib.suppress(OSError):  # the terminal may be what went away
        os.write(2, text.encode())
