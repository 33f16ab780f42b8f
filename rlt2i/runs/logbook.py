"""A run's directory and its log, opened in the right order around a rewind, by the first process only."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.checkpoint import clean_staging, prune, set_aside_after
from rlt2i.runs.directory import RunDirectory, disk_errors
from rlt2i.runs.metrics import FAILURES, append_lines
from rlt2i.runs.runlog import RunLog


class Logbook:
    """Run directory and log of the first process; close it.

    Args:
        recipe: resolved.
        run_dir: made, started over, or taken up.
        resumed: whether the run goes on from a checkpoint.
        inputs: what the recipe reads; see `identity.inputs_of`.
        accepted: changes of it that the user has agreed to.

    Raises:
        RunDirectoryError: when the folder cannot be used; says why.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        *,
        resumed: bool,
        inputs: Mapping[str, Any] | None = None,
        accepted: Sequence[str] = (),
    ) -> None:
        inputs = inputs or {}
        if resumed:
            self._run = RunDirectory.open(run_dir, accepted)
            self._run.write_inputs(inputs)
        else:
            self._run = RunDirectory.create(run_dir, recipe.mapping(), recipe.hash, inputs)
        clean_staging(run_dir)
        self._trackers = recipe.train.trackers
        self._keep = recipe.train.keep_checkpoints
        self._log: RunLog | None = None

    def check(self) -> None:
        """Refuse to go on in a folder that is no longer this run's; see `RunDirectory.check`."""
        self._run.check()

    def rewind(self, iteration: int) -> list[str]:
        """Forget what came after `iteration`, so that no iteration is logged or kept twice; the lines dropped."""
        set_aside_after(self._run.path, iteration)
        prune(self._run.path, iteration, self._keep)  # a kill may have come between a checkpoint and this
        return self._run.rewind(iteration)

    def has(self, iteration: int, phase: str) -> bool:
        """Whether this iteration of the phase is logged already."""
        return self._opened().last(phase) >= iteration

    def _opened(self) -> RunLog:
        if self._log is None:
            self._log = RunLog(self._run, trackers=self._trackers)
        return self._log

    def log(self, iteration: int, metrics: Mapping[str, Any], *, phase: str = "train") -> None:
        self.check()
        self._opened().log(iteration, metrics, phase=phase)

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
        path = self._run.path / FAILURES
        with disk_errors(path), path.open("a", encoding="utf-8") as stream:
            append_lines(stream, [json.dumps(record)])

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        self._run.close()
