"""Writes the metrics of a run: a line per iteration and phase, and what trackers show of it."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from rlt2i.runs.directory import IMAGES, RunDirectory, disk_errors
from rlt2i.runs.metrics import METRICS, append_lines, parse_metrics
from rlt2i.runs.trackers import start_tracker

_RESERVED = ("step", "phase", "time", "nonfinite")


class RunLog:
    """Writes metrics to metrics.jsonl and to trackers. A tracker that fails is switched off; JSONL goes on.

    Args:
        run: held by this process; rewound, if it is continued.
        trackers: of "tensorboard", "wandb", "trackio"; the first is left out where it is not installed.
        options: per tracker, keyword arguments of its start (`wandb.init`, ...).

    Raises:
        ValueError: if a tracker is unknown or not installed, or a line of the metrics is damaged, because the run
            was not rewound.
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
        for line, record in parse_metrics(path.read_text(encoding="utf-8") if path.exists() else ""):
            if record is None:
                raise ValueError(f"{path}: a line is damaged: {line[:80]!r}. Call run.rewind(step) first.")
            self._last[record["phase"]] = record["step"]
        self._stream: TextIO = path.open("a", encoding="utf-8")
        first = max(self._last.values(), default=-1) + 1
        self._trackers = {}
        for name in trackers:
            settings = (options or {}).get(name, {})
            tracker = start_tracker(name, run.path, run.recipe_hash, first_step=first, options=settings)
            if tracker is not None:
                self._trackers[name] = tracker

    def last(self, phase: str) -> int:
        """The last step of a phase that is logged; -1 for none."""
        return self._last.get(phase, -1)

    def log(self, step: int, metrics: Mapping[str, float | Tensor], *, phase: str = "train") -> None:
        """Append one line, and have it on disk before returning.

        Args:
            step: iterations finished.
            metrics: numbers and scalar tensors. NaN and infinity become null, their names go into
                "nonfinite".
            phase: "train" or "eval".

        Raises:
            ValueError: on a value that is not one number, a reserved name, or a step this phase has logged.
            RunDirectoryError: when the disk refuses.
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
        with disk_errors(self.run.path / METRICS):
            append_lines(self._stream, [json.dumps(record, allow_nan=False)])
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
        with contextlib.suppress(OSError):  # what could not be written was reported when it was logged
            self._stream.close()

    def _tell(self, action: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._trackers[name]
                warnings.warn(f"{name} failed and is switched off: {error}. JSONL goes on.", stacklevel=3)


def _one_number(name: str, value: Any) -> float | int:
    if isinstance(value, bool | int):
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"RunLog.log: {name!r} is {what}, not a number. Log its mean, say.") from error
