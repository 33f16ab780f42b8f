"""The directory of a run: one writer at a time, started over only while nothing was learned in it.

<run>/
    recipe.yaml              the resolved recipe, secrets redacted; can be run again
    inputs.json              absolute path and SHA-256 of every data file and module that the recipe reads
    versions.json            recipe hash, versions, commit, platform, command line; later starts in "resumed"
    metrics.jsonl            a line per iteration and phase: {"step", "phase", "time", name: number or null}
    metrics.dropped.jsonl    lines after the checkpoint that a resumed run went back to
    failures.jsonl           a line per iteration whose reward could not judge some image: {"step", "phase", "time",
                             "images", "invalid", "reasons": {reason: images}}
    images/, maps/, tensorboard/, checkpoint-<step>/
    run.lock                 held by the process that writes
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import socket
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rlt2i.config.secrets import redacted
from rlt2i.runs.checkpoint import has_checkpoint
from rlt2i.runs.files import NO_LOCKS, advice, plain_json, remove_partials, replace_text
from rlt2i.runs.metrics import DROPPED, FAILURES, METRICS, append_lines, parse_metrics
from rlt2i.runs.provenance import versions

RECIPE = "recipe.yaml"
INPUTS = "inputs.json"
VERSIONS = "versions.json"
IMAGES = "images"
MAPS = "maps"
LOCK = "run.lock"


class RunDirectoryError(RuntimeError):
    """A run directory cannot be used as asked; says why and what to do."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an error of the system in a block into one that says what to do.

    Raises:
        RunDirectoryError: in place of OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(f"{path}: {error}. {advice(error, path)}") from error


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
    def create(
        cls, path: Path, recipe: Mapping[str, Any], recipe_hash: str, inputs: Mapping[str, Any] | None = None
    ) -> RunDirectory:
        """Make the folder and write down the recipe, what it reads, and where it runs.

        A folder whose run was stopped before its first checkpoint is started over: nothing was learned in it.

        Raises:
            RunDirectoryError: if it already holds a checkpoint, another process is using it, or the disk refuses.
            ValueError: if the recipe is not plain data.
        """
        from rlt2i.config import dump_yaml

        text = dump_yaml(redacted(plain_json(recipe, "recipe")))
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, _take_lock(path))
            try:
                if has_checkpoint(path):
                    raise RunDirectoryError(
                        f"{path}: already holds a run. Continue it with --resume, or choose another with --run-dir."
                    )
                run.recipe_hash = recipe_hash
                if (path / RECIPE).exists():
                    run._forget_start()
                remove_partials(path)
                (path / IMAGES).mkdir(exist_ok=True)
                replace_text(path / VERSIONS, json.dumps({"recipe": recipe_hash, **versions()}, indent=1))
                run.write_inputs(inputs or {})
                replace_text(path / RECIPE, text)  # last: a folder with a recipe is a run
            except BaseException:
                run.close()
                raise
        return run

    @classmethod
    def open(cls, path: Path, accepted: Sequence[str] = ()) -> RunDirectory:
        """Take up an existing run to continue it; call `rewind` before logging.

        Args:
            accepted: changes of what the recipe reads that the user has agreed to, to be written down.

        Raises:
            RunDirectoryError: if there is no run, another process is using it, or the disk refuses.
        """
        if not (path / RECIPE).is_file():
            raise RunDirectoryError(f"{path}: no {RECIPE}, so no run to continue. Start it without --resume.")
        with disk_errors(path):
            run = cls(path, _take_lock(path))
        try:
            known = json.loads((path / VERSIONS).read_text(encoding="utf-8"))
            run.recipe_hash = known["recipe"]
            now = versions() | ({"accepted_changes": list(accepted)} if accepted else {})
            known["resumed"] = [*known.get("resumed", []), now]
        except (OSError, ValueError, KeyError, TypeError) as error:
            run.close()
            raise RunDirectoryError(
                f"{path / VERSIONS}: missing or damaged ({type(error).__name__}: {error}), so it is unknown "
                "which recipe the run was made with. Start a new run, or put the file back."
            ) from error
        try:
            with disk_errors(path):
                replace_text(path / VERSIONS, json.dumps(known, indent=1))
                remove_partials(path)
        except BaseException:
            run.close()
            raise
        return run

    def write_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Write down what the recipe reads; see `identity.inputs_of`."""
        replace_text(self.path / INPUTS, json.dumps(inputs, indent=1, sort_keys=True) + "\n")

    def check(self) -> None:
        """Refuse to go on in a folder that is no longer this run's.

        Raises:
            RunDirectoryError: if it was deleted or renamed, or its lock was replaced, so that another run may write.
        """
        try:
            there = os.stat(self.path / LOCK)
        except OSError:
            there = None
        held = os.fstat(self._lock) if self._lock is not None else None
        if there is None or held is None or (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino):
            what = "was deleted or renamed" if there is None else "has another lock file than the one this run made"
            raise RunDirectoryError(
                f"{self.path}: the run directory {what} while the run was going on, so nothing more is written there. "
                "Put it back and resume, or start a new run; never delete run.lock of a run that is going on."
            )

    def rewind(self, step: int) -> list[str]:
        """Drop what was logged after `step`, and lines that are damaged: no step is logged twice.

        The dropped lines are kept in metrics.dropped.jsonl.

        Args:
            step: iterations finished in the checkpoint that the run goes on from; -1 for none.

        Returns:
            The lines dropped.
        """
        path = self.path / METRICS
        if not path.exists():
            return []
        with disk_errors(path):
            text = path.read_text(encoding="utf-8", errors="replace")
            kept: list[str] = []
            dropped: list[str] = []
            for line, record in parse_metrics(text):
                (kept if record is not None and record["step"] <= step else dropped).append(line)
            if dropped:
                # First, so that a crash in between duplicates dropped lines rather than losing them.
                with (self.path / DROPPED).open("a", encoding="utf-8") as stream:
                    append_lines(stream, dropped)
            content = "".join(f"{line}\n" for line in kept)
            if content != text:
                replace_text(path, content)
        return dropped

    def _forget_start(self) -> None:
        """Remove what an earlier start left that never came to a checkpoint; its metrics are set aside."""
        self.rewind(-1)
        for folder, pattern in ((IMAGES, "eval-*.safetensors"), (MAPS, "step-*.safetensors")):
            for file in (self.path / folder).glob(pattern):
                file.unlink()
        (self.path / FAILURES).unlink(missing_ok=True)

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


def _take_lock(path: Path) -> int:
    import fcntl

    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            warnings.warn(
                f"{path}: this file system has no locks, so nothing keeps two processes from writing one run. Make "
                "sure that only one does.",
                stacklevel=3,
            )
        else:
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
