"""A run's directory and its log, opened in the right order around a rewind, by the first process only."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlt2i.distributed import Processes
from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.checkpoint import clean_staging, set_aside_after
from rlt2i.runs.metrics import FAILURES, RunDirectory, RunLog


class Logbook:
    """Run directory and log of the first process."""

    def __init__(self, recipe: Recipe, run_dir: Path, resumed: bool) -> None:
        mapping = recipe.mapping()
        self._run = RunDirectory.open(run_dir) if resumed else RunDirectory.create(run_dir, mapping, recipe.hash)
        clean_staging(run_dir)
        self._trackers = recipe.train.trackers
        self._log: RunLog | None = None

    def rewind(self, iteration: int) -> None:
        """Forget what came after `iteration`, so that no iteration is logged or kept twice."""
        set_aside_after(self._run.path, iteration)
        self._run.rewind(iteration)

    def log(self, iteration: int, metrics: Mapping[str, Any], *, phase: str = "train") -> None:
        if self._log is None:
            self._log = RunLog(self._run, trackers=self._trackers)
        self._log.log(iteration, metrics, phase=phase)

    def failures(self, iteration: int, reasons: Mapping[str, int], *, images: int, phase: str) -> None:
        """Append to failures.jsonl why images were not judged; after a resume an iteration may come twice."""
        record = {
            "step": iteration,
            "phase": phase,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "images": images,
            "invalid": sum(reasons.values()),
            "reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])),
        }
        with (self._run.path / FAILURES).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        self._run.close()


@contextlib.contextmanager
def open_logbook(recipe: Recipe, run_dir: Path, resumed: bool, processes: Processes) -> Iterator[Logbook | None]:
    """The logbook on the first process, nothing on the others; closed on leaving."""
    if not processes.is_main:
        yield None
        return
    book = Logbook(recipe, run_dir, resumed)
    try:
        yield book
    finally:
        book.close()
