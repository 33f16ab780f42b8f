"""Files that survive a power cut: flushed to disk, hashed, JSON that reads back as written, no pickle."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def replace_text(path: Path, text: str) -> None:
    """Exchange the content of a file in one step: a reader, or a crash, sees the old or the new text."""
    partial = path.with_name(f".{path.name}.partial")
    write_text(partial, text)
    os.replace(partial, path)
    flush(path.parent)


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
