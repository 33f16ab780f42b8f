"""Work beside the rollout: decoding and scoring of one chunk while the next one is rolled out."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

Result = TypeVar("Result")


class Beside(Generic[Result]):
    """Jobs done by threads of their own, whose results come back in the order in which the jobs were handed in.

    Threads end with the block. A job that fails ends the work: its error is raised where the next job is handed in, or
    where results are asked for, and no further job begins. Threads never keep a process alive.

    Args:
        workers: jobs at a time.
        ahead: jobs that may wait for a worker; handing in another one waits too, so that what was rolled out and not
            judged yet stays bounded.
        device: of the work. On CUDA every worker has a stream of its own, which waits for what was queued when the job
            was handed in; results are finished when they come back.
    """

    def __init__(self, *, workers: int = 1, ahead: int = 2, device: torch.device | str = "cpu") -> None:
        self._workers, self._ahead, self._device = workers, ahead, torch.device(device)
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, Callable[[], Result], contextvars.Context, torch.cuda.Event | None]] = deque()
        self._done: dict[int, Result] = {}
        self._errors: dict[int, BaseException] = {}
        self._handed_in, self._started, self._closed = 0, 0, False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def hand_in(self, job: Callable[[], Result]) -> None:
        """Have a job done, once there is room for it.

        Raises:
            BaseException: that of an earlier job.
        """
        queued = None
        if self._device.type == "cuda":
            queued = torch.cuda.Event()
            queued.record(torch.cuda.current_stream(self._device))
        with self._changed:
            self._changed.wait_for(lambda: self._errors or len(self._waiting) < self._ahead)
            self._raise_first()
            self._waiting.append((self._handed_in, job, contextvars.copy_context(), queued))
            self._handed_in += 1
            self._changed.notify_all()
        if self._started < min(self._workers, self._handed_in):
            self._started += 1
            threading.Thread(target=self._work, daemon=True, name="beside the rollout").start()

    def results(self) -> list[Result]:
        """What all jobs returned, in order.

        Raises:
            BaseException: that of the first job that failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._errors or len(self._done) == self._handed_in)
            self._raise_first()
            return [self._done[number] for number in range(self._handed_in)]

    def _raise_first(self) -> None:
        if self._errors:
            raise self._errors[min(self._errors)]

    def _work(self) -> None:
        with self._on_own_stream() as stream:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._errors or self._waiting)
                    if self._closed or self._errors:
                        return
                    number, job, context, queued = self._waiting.popleft()
                    self._changed.notify_all()
                try:
                    if stream is not None and queued is not None:
                        stream.wait_event(queued)
                    result = context.run(job)
                    if stream is not None:
                        stream.synchronize()
                except BaseException as error:
                    with self._changed:
                        self._errors[number] = error
                        self._changed.notify_all()
                    return
                with self._changed:
                    self._done[number] = result
                    self._changed.notify_all()

    @contextlib.contextmanager
    def _on_own_stream(self) -> Iterator[torch.cuda.Stream | None]:
        if self._device.type != "cuda":
            yield None
            return
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            yield stream
