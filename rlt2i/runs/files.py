"""Files that survive a power cut: flushed to disk, hashed, JSON that reads back as written, no pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})
"""What the system says where a file system has no locks."""
_PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib"}
_PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


def flush(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text and flush it to the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Exchange a file in one step: a reader, or a crash, sees the old or the new content, never a part.

    Yields:
        A path in the same folder to write the new content to. When the block ends it is flushed and renamed; when the
        block fails it is removed.
    """
    partial = _partial(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors and tempfile write files that only their owner may read
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Exchange the content of a file for UTF-8 text, in one step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def replace_bytes(path: Path, content: bytes) -> None:
    """Exchange the content of a file, in one step."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Exchange the content of a safetensors file, in one step.

    Args:
        tensors: of any device and memory layout; they may share memory.
    """
    with replacing(path) as partial:
        save_tensors(partial, tensors, metadata=metadata)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in place, for callers that stage a whole folder."""
    dense: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        # safetensors refuses strides (the images of a channels-last decoder) and memory that two names share.
        value = tensor.detach().contiguous()
        dense[name] = value.clone() if value.untyped_storage().data_ptr() in taken else value
        taken.add(dense[name].untyped_storage().data_ptr())
    with naming_what_fails(path):
        save_file(dense, path, metadata=None if metadata is None else dict(metadata))


@contextlib.contextmanager
def naming_what_fails(path: Path) -> Iterator[None]:
    """Errors of the system that safetensors meets in the block become Python's own, with a path."""
    try:
        yield
    except SafetensorError as error:
        if failure := error_of_the_system(error, path):
            raise failure from error
        raise


def error_of_the_system(error: Exception, path: Path | None = None) -> OSError | None:
    """The error that safetensors passes on as text ("... (os error 28)"), as Python would have raised it."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    return OSError(int(code[1]), os.strerror(int(code[1])), *([str(path)] if path else [])) if code else None


def create_text(path: Path, text: str) -> None:
    """Write a file unless it is there; of several processes that try, one wins and none sees half of it."""
    partial = _partial(path)
    try:
        write_text(partial, text)
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def remove_partials(folder: Path, *, of_the_dead: bool = False) -> list[Path]:
    """Remove what writers that were killed left in a folder and below.

    Args:
        of_the_dead: leave what may be under way: of living processes of this machine, and of other machines while it
            is younger than an hour. Without it this must be the folder's only writer.

    Returns:
        The files removed.
    """
    partials = [path for path in sorted(folder.rglob(".*.partial")) if not (of_the_dead and _under_way(path))]
    for path in partials:
        path.unlink(missing_ok=True)
    return partials


def _under_way(partial: Path) -> bool:
    host, _, number = partial.name.removesuffix(".partial").rpartition("-")
    if number.isdigit() and host.endswith(f".{socket.gethostname()}"):
        return int(number) != os.getpid() and process_is_alive(int(number))
    try:
        return time.time() - partial.stat().st_mtime < 3600
    except FileNotFoundError:
        return False


def process_is_alive(number: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(number, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def advice(error: OSError, path: Path) -> str:
    """What a user can do about an error of the system, in a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        there = next((folder for folder in (path, *path.parents) if folder.exists()), Path())
        free = shutil.disk_usage(there).free / 1e9
        return f"Disk or quota full ({free:.2f} GB free): free some space, lower `keep_checkpoints`, or move the run."
    if error.errno in (errno.EACCES, errno.EPERM):
        return "It belongs to another user or is protected: choose another folder with --run-dir, or ask its owner."
    if error.errno == errno.EROFS:
        return "The disk is mounted read-only: choose a folder on another one with --run-dir."
    return "Check that the folder is there, on a healthy, writable disk."


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def looks_like_pickle(path: Path) -> bool:
    """Whether a file is, by name or first bytes, a pickle or a torch.save archive."""
    with path.open("rb") as stream:
        start = stream.read(9)
    # A safetensors file starts with the length of its JSON header, which may equal a pickle's first bytes.
    return path.suffix in _PICKLE_SUFFIXES or (start.startswith(_PICKLE_STARTS) and start[8:] != b"{")


def plain_json(value: Any, where: str) -> Any:
    """Lists, text-keyed dicts, text, finite numbers: what JSON gives back unchanged (tuples become lists).

    Raises:
        ValueError: on anything else, naming the place below `where`.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} would come back as text. Use strings as keys.")
        return {key: plain_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(f"{where}={value!r}: not JSON. Use finite numbers, text, lists and text-keyed mappings.")
