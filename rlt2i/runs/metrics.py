"""What a run remembers: one directory with one writer, and metrics that nobody has to log in for.

<run>/
    recipe.yaml              the resolved recipe, secrets redacted; can be run again
    versions.json            recipe hash, versions, commit, platform, command line; later starts in "resumed"
    metrics.jsonl            a line per iteration and phase: {"step", "phase", "time", name: number or null}
    metrics.dropped.jsonl    lines after the checkpoint that a resumed run went back to
    failures.jsonl           a line per iteration whose reward could not judge some image: {"step", "phase", "time",
                             "images", "invalid", "reasons": {reason: images}}
    images/, tensorboard/, checkpoint-<step>/
    run.lock                 held by the process that writes
"""

from __future__ import annotations

import datetime
import errno
import json
import math
import os
import re
import shutil
import socket
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch import Tensor

from rlt2i.runs.files import flush, plain_json, replace_text, write_text
from rlt2i.runs.provenance import redacted, versions
from rlt2i.runs.terminal import Progress as Progress
from rlt2i.runs.terminal import summary_line as summary_line
from rlt2i.runs.trackers import start_tracker

RECIPE = "recipe.yaml"
VERSIONS = "versions.json"
METRICS = "metrics.jsonl"
DROPPED = "metrics.dropped.jsonl"
FAILURES = "failures.jsonl"
IMAGES = "images"
LOCK = "run.lock"

_RESERVED = ("step", "phase", "time", "nonfinite")


class RunDirectoryError(RuntimeError):
    """A run directory cannot be used as asked; says why and what to do."""


class RunDirectory:
    """The folder of one run, held by one process. Use `create` or `open`, and `close` it or use it in `with`.

    The lock goes with the process, however that ends; children made by fork do not hold it.

    Attributes:
        path: the folder.
        recipe_hash: of the recipe the run was created with.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.recipe_hash = ""
        self._lock: int | None = lock
        # A child made by fork shares the lock, and would keep it when this process is killed.
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: None if (run := this()) is None else run.close())

    @classmethod
    def create(cls, path: Path, recipe: Mapping[str, Any], recipe_hash: str) -> RunDirectory:
        """Make the folder and write down the recipe and where it runs.

        Raises:
            RunDirectoryError: if it already holds a run, or another process is using it.
            ValueError: if the recipe is not plain data.
        """
        from rlt2i.config import dump_yaml

        text = dump_yaml(redacted(plain_json(recipe, "recipe")))
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, _take_lock(path))
        try:
            if (path / RECIPE).exists():
                raise RunDirectoryError(
                    f"{path}: already holds a run. Continue it with --resume, or choose another with --run-dir."
                )
            run.recipe_hash = recipe_hash
            (path / IMAGES).mkdir(exist_ok=True)
            write_text(path / VERSIONS, json.dumps({"recipe": recipe_hash, **versions()}, indent=1))
            write_text(path / RECIPE, text)  # last: a folder with a recipe is a run
            flush(path)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Take up an existing run to continue it; call `rewind` before logging.

        Raises:
            RunDirectoryError: if there is no run, or another process is using it.
        """
        if not (path / RECIPE).is_file():
            raise RunDirectoryError(f"{path}: no {RECIPE}, so no run to continue. Start it without --resume.")
        run = cls(path, _take_lock(path))
        try:
            known = json.loads((path / VERSIONS).read_text(encoding="utf-8"))
            run.recipe_hash = known["recipe"]
            known["resumed"] = [*known.get("resumed", []), versions()]
            replace_text(path / VERSIONS, json.dumps(known, indent=1))
        except (OSError, ValueError, KeyError, TypeError) as error:
            run.close()
            raise RunDirectoryError(
                f"{path / VERSIONS}: missing or damaged ({type(error).__name__}: {error}), so it is unknown "
                "which recipe the run was made with. Start a new run, or put the file back."
            ) from error
        return run

    def rewind(self, step: int) -> int:
        """Drop what was logged after `step`, and a line cut short: no step is logged twice.

        The dropped lines are kept in metrics.dropped.jsonl.

        Args:
            step: iterations finished in the checkpoint that the run goes on from; -1 for none.

        Returns:
            The number of lines dropped.
        """
        path = self.path / METRICS
        if not path.exists():
            return 0
        text = path.read_text(encoding="utf-8", errors="replace")
        kept: list[str] = []
        dropped: list[str] = []
        for line in text.splitlines():
            record = _record(line)
            (kept if record is not None and record["step"] <= step else dropped).append(line)
        if dropped:
            # First, so that a crash in between duplicates dropped lines rather than losing them.
            with (self.path / DROPPED).open("a", encoding="utf-8") as stream:
                _append(stream, dropped)
        content = "".join(f"{line}\n" for line in kept)
        if content != text:
            replace_text(path, content)
        return len(dropped)

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path, phase: str = "train") -> list[dict[str, Any]]:
    """The complete lines of one phase of a run's metrics; needs no lock, so a live run can be read."""
    file = path / METRICS
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    return [record for line in lines if (record := _record(line)) is not None and record["phase"] == phase]


class RunLog:
    """Writes metrics to metrics.jsonl and to trackers. A tracker that fails is switched off; JSONL goes on.

    Args:
        run: held by this process; rewound, if it is continued.
        trackers: of "tensorboard", "wandb", "trackio"; the first is left out where it is not installed.
        options: per tracker, keyword arguments of its start (`wandb.init`, ...).

    Raises:
        ValueError: if a tracker is unknown or not installed.
        RunDirectoryError: if the metrics end in a line cut short, because the run was not rewound.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        trackers: Sequence[str] = ("tensorboard",),
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.run = run
        self._last: dict[str, int] = {}
        path = run.path / METRICS
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            if (record := _record(line)) is None:
                raise RunDirectoryError(f"{path}: a line was cut short. Call run.rewind(step) first.")
            self._last[record["phase"]] = record["step"]
        self._stream: TextIO = path.open("a", encoding="utf-8")
        first = max(self._last.values(), default=-1) + 1
        self._trackers = {}
        for name in trackers:
            settings = (options or {}).get(name, {})
            tracker = start_tracker(name, run.path, run.recipe_hash, first_step=first, options=settings)
            if tracker is not None:
                self._trackers[name] = tracker

    def log(self, step: int, metrics: Mapping[str, float | Tensor], *, phase: str = "train") -> None:
        """Append one line, and have it on disk before returning.

        Args:
            step: iterations finished.
            metrics: numbers and scalar tensors. NaN and infinity become null, their names go into
            "nonfinite".
            phase: "train" or "eval".

        Raises:
            ValueError: on a value that is not one number, a reserved name, or a step this phase has logged.
        """
        if step <= self._last.get(phase, -1):
            raise ValueError(
                f"RunLog.log(step={step}, phase={phase!r}): step {self._last[phase]} is logged already. "
                "Merge the metrics of a step into one call; after resuming, rewind the run first."
            )
        if clash := [name for name in metrics if name in _RESERVED]:
            raise ValueError(f"RunLog.log: the names {clash} are taken by the log itself. Use 'group/name'.")
        numbers = {name: _one_number(name, value) for name, value in metrics.items()}
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        finite = {name: value for name, value in numbers.items() if name not in bad}
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record: dict[str, Any] = {
            "step": step,
            "phase": phase,
            "time": time,
            **{name: finite.get(name) for name in numbers},
        }
        if bad:
            record["nonfinite"] = bad
        _append(self._stream, [json.dumps(record, allow_nan=False)])
        self._last[phase] = step
        self._tell(lambda tracker: tracker.log(finite, step=step))

    def images(self, step: int, name: str, path: Path) -> Path:
        """Keep an image file in images/ and show it to the trackers that take images.

        Returns:
            Where it is kept: images/<name>-<step>.<suffix>.
        """
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
        kept = self.run.path / IMAGES / f"{stem}-{step:06d}{path.suffix}"
        if path.resolve() != kept.resolve():
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, kept)

        def show(tracker: Any) -> None:
            if not hasattr(tracker, "log_images"):
                return
            import numpy as np
            from PIL import Image

            with Image.open(kept) as image:
                pixels = np.asarray(image.convert("RGB"))
            if tracker.name == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [pixels]}, step=step)

        self._tell(show)
        return kept

    def close(self) -> None:
        """Finish the trackers and close the file."""
        self._tell(lambda tracker: tracker.finish())
        self._trackers.clear()
        self._stream.close()

    def _tell(self, action: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._trackers[name]
                warnings.warn(f"{name} failed and is switched off: {error}. JSONL goes on.", stacklevel=3)


def _take_lock(path: Path) -> int:
    import fcntl

    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(lock, 1000, 0).decode(errors="replace").strip() or "another process"
        os.close(lock)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise RunDirectoryError(
            f"{path}: in use by {owner}. Wait until it ends, stop it with `kill` and that number, or choose "
            "another folder with --run-dir."
        ) from error
    now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode(), 0)
    return lock


def _record(line: str) -> dict[str, Any] | None:
    """A line of metrics, or None for one that a crash cut short."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) and isinstance(record["phase"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def _append(stream: TextIO, lines: Sequence[str]) -> None:
    stream.write("".join(f"{line}\n" for line in lines))
    stream.flush()
    os.fsync(stream.fileno())


def _one_number(name: str, value: Any) -> float | int:
    if isinstance(value, bool | int):
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"RunLog.log: {name!r} is {what}, not a number. Log its mean, say.") from error
