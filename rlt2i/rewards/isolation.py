"""A reward is foreign code in the middle of a run: what it is handed is a copy, and what it bends is bent back.

A reward may scribble on its images, keep them, change the default dtype or the working directory, or leave gradients
switched off. None of that may reach the images that are saved, the next reward, or the update that follows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import numpy as np
import torch

from rlt2i.interfaces import RewardBatch

_LOG = logging.getLogger(__name__)
_LONGEST = 1000
"""Characters of a message that are kept."""
_SAID: set[tuple[str, str]] = set()
UNREADABLE = "(its message cannot be read)"


def private_copy(batch: RewardBatch) -> RewardBatch:
    """The same question in memory of its own; uint8 images cost next to nothing to copy."""
    return attrs.evolve(
        batch,
        images=batch.images.clone(),
        prompts=list(batch.prompts),
        metadata=[_copied(row) for row in batch.metadata],
        groups=None if batch.groups is None else batch.groups.clone(),
        ids=None if batch.ids is None else list(batch.ids),
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------- state of the process

_Read = Callable[[], Any]
_Write = Callable[[Any], Any]


def _signals() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _set_signals(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # one that was not installed from Python
            signal.signal(number, handler)


def _streams() -> tuple[Any, Any]:
    return sys.stdout, sys.stderr


def _set_streams(streams: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = streams


def _set_deterministic(state: tuple[bool, bool]) -> None:
    torch._C._set_deterministic_algorithms(state[0], warn_only=state[1])  # the public one imports inductor


def _default_device() -> Any:
    """None where there is none: setting "cpu" instead would slow every creation of a tensor down."""
    try:
        context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    except AttributeError:
        return torch.get_default_device()
    return None if context is None else context.device


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


_Settings = Mapping[str, tuple[_Read, _Write]]
_SIGNALS = "the handling of signals"  # of the main thread alone
_SETTINGS: _Settings = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (_default_device, torch.set_default_device),
    "the recording of gradients": (torch.is_grad_enabled, torch._C._set_grad_enabled),
    "autocast": (
        lambda: (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        lambda on: [torch.set_autocast_enabled(kind, flag) for kind, flag in zip(("cpu", "cuda"), on, strict=True)],
    ),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (_deterministic, _set_deterministic),
    "the precision of float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "NumPy's treatment of floating-point errors": (np.geterr, lambda state: np.seterr(**state)),
    "the working directory": (os.getcwd, os.chdir),
    "Python's recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "standard output": (_streams, _set_streams),
    _SIGNALS: (_signals, _set_signals),
}


@contextlib.contextmanager
def unchanged_process(name: str) -> Iterator[None]:
    """Put back what a reward of this name changes for the whole process, and say so.

    Of several threads that score at the same time only one does this: another would put back its temporary changes.
    While a reward scores beside a rollout, the rollout sees what the reward changes, until it is put back. Random
    number generators stay as they are; nothing that a run draws comes from the global ones.
    """
    if threading.current_thread() is threading.main_thread():
        with _unchanged(name, _SETTINGS):
            yield
    elif _BESIDE.acquire(blocking=False):
        try:
            with _unchanged(name, {what: how for what, how in _SETTINGS.items() if what != _SIGNALS}):
                yield
        finally:
            _BESIDE.release()
    else:
        yield


_BESIDE = threading.RLock()
"""Held by the one thread, besides the main one, that looks after the process."""


@contextlib.contextmanager
def _unchanged(name: str, settings: _Settings) -> Iterator[None]:
    before = {what: read() for what, (read, _) in settings.items()}
    # A guard of our own undoes an inference mode that was entered and never left.
    with torch.inference_mode(torch.is_inference_mode_enabled()):
        torch._C._set_grad_enabled(before["the recording of gradients"])
        try:
            yield
        finally:
            fresh = [what for what in _put_back(before) if (name, what) not in _SAID]
            if fresh:
                _SAID.update((name, what) for what in fresh)
                _LOG.warning("%s changed %s while it scored; put back, every time.", name, " and ".join(fresh))


def _put_back(before: Mapping[str, Any]) -> list[str]:
    changed = [what for what in before if _differs(_SETTINGS[what][0], before[what])]
    for what in changed:
        _SETTINGS[what][1](before[what])
    if any(filter[0] == "error" and filter[2] is Warning for filter in warnings.filters[:1]):
        warnings.filters.pop(0)  # type: ignore[attr-defined]
        changed.append("warnings, which became errors")
    return changed


def _differs(read: _Read, before: Any) -> bool:
    try:
        return bool(read() != before)
    except OSError:  # the working directory was removed
        return True


# ------------------------------------------------------------------------------------------------------------ messages


def message_of(error: BaseException) -> str:
    """ "Type: text" of an error: on one line, printable, short, whatever its `str` does."""
    try:
        text = str(error)
    except BaseException as worse:
        if isinstance(worse, KeyboardInterrupt):
            raise
        text = UNREADABLE
    return one_line(f"{type(error).__name__}: {text[:_LONGEST]}" if text else type(error).__name__)


def one_line(text: str) -> str:
    """Text that can be written into any file and on any terminal: half characters and control characters escaped."""
    whole = text[: _LONGEST + 100].encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(mark if mark.isprintable() else " " if mark.isspace() else f"\\x{ord(mark):02x}" for mark in whole)
