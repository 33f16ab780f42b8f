"""Forked children that die, or meet an error, at the n-th change they make below a folder.

Python reports every opening, renaming, removal, ... to audit hooks before it happens. Flushing, and what safetensors
writes from Rust, are reported by wrappers; safetensors is stopped before and in the middle of a file.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

KILLED = 77
CHANGES = {
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "fcntl.flock",
}  # fmt: skip


class Watch:
    """Calls `act(number, event, path)` before every change below `folder`, numbered from 0; never removed."""

    def __init__(self, folder: Path, act: Callable[[int, str, str], None]) -> None:
        self.folder, self.act, self.count, self.busy = str(folder.resolve()), act, 0, False

    def install(self) -> None:
        sys.addaudithook(self._audit)
        truncate = os.ftruncate

        def flushed(descriptor: int) -> None:
            self.happens("fsync", descriptor)  # and nothing else: what a process wrote outlives it without

        def shortened(descriptor: int, length: int) -> None:
            self.happens("ftruncate", descriptor)
            truncate(descriptor, length)

        os.fsync, os.ftruncate = flushed, shortened
        _interrupted_safetensors(self)

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """What happens in the block is ours."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or self.busy:
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        with self.unseen():
            folders = (
                [a for a in args[1:] if isinstance(a, int) and a > 2] if event in ("os.remove", "os.rmdir") else []
            )
            target = os.path.join(_path(folders[0]), args[0]) if folders else args[0]
        self.happens(event, target)

    def happens(self, event: str, target: object) -> None:
        if self.busy:
            return
        with self.unseen():
            path = _path(target)
            if path == self.folder or path.startswith(self.folder + os.sep):
                self.count += 1
                self.act(self.count - 1, event, path)


def _path(target: object) -> str:
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    return os.path.abspath(os.fsdecode(os.fspath(target)))  # type: ignore[arg-type]


def _interrupted_safetensors(watch: Watch) -> None:
    from rlt2i.runs import files

    save = files.save_file

    def halves(tensors: Any, path: Any, **options: Any) -> None:
        watch.happens("safetensors", path)
        save(tensors, path, **options)
        whole = Path(path).read_bytes()
        with watch.unseen():
            os.truncate(path, len(whole) // 2)
        watch.happens("safetensors, half", path)
        with watch.unseen():
            Path(path).write_bytes(whole)

    files.save_file = safetensors.torch.save_file = halves  # type: ignore[assignment]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        yield


def in_a_fork(work: Callable[[], object]) -> int:
    """Exit status of a child that does the work: 0, 1 after an exception (on stderr), or what it died with."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the threads of the parent are not here
            with _silent():
                work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def changes(work: Callable[[], object], folder: Path, note: Path) -> list[str]:
    """Every change that the work makes below the folder, as "event path"; `note` is a file outside of it."""

    def watched() -> None:
        with note.open("w") as stream:
            Watch(folder, lambda _, event, path: print(event, path, file=stream)).install()
            work()
            stream.flush()

    assert in_a_fork(watched) == 0
    return note.read_text().splitlines()


def killed(work: Callable[[], object], folder: Path, at: int) -> bool:
    """Whether a child that did the work died before change number `at`; False: it made fewer, and ended well."""

    def dies(number: int, event: str, path: str) -> None:
        if number == at:
            os._exit(KILLED)

    def watched() -> None:
        Watch(folder, dies).install()
        work()

    status = in_a_fork(watched)
    assert status in (0, KILLED), f"change {at}: ended with {status}"
    return status == KILLED


WRITES = {"open", "os.mkdir", "os.link", "os.symlink", "fsync", "safetensors", "safetensors, half"}
"""Changes that take space, or a right to write."""


def refused(words: Sequence[str], folder: Path, at: int, code: int, note: Path) -> tuple[int, str]:
    """Exit status and standard error of a command to which the system says no from change number `at` on.

    Args:
        words: of the command line.
        code: of the error, such as ENOSPC.
        note: a file outside of the folder, for what the command says.
    """

    def refuses(number: int, event: str, path: str) -> None:
        if number >= at and event in WRITES:
            if event.startswith("safetensors"):  # which says it in its own way
                raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
            raise OSError(code, os.strerror(code), path)

    def watched() -> None:
        from rlt2i.cli import main

        with note.open("w") as stream, contextlib.redirect_stderr(stream):
            Watch(folder, refuses).install()
            status = main(words)
        if status:
            os._exit(status)

    return in_a_fork(watched), note.read_text()
