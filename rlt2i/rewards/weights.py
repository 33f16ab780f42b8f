"""Where the weights of model rewards are, and how they run: shared by all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

CONVERT: Final = "rlt2i reward convert"
"""The command that downloads a released checkpoint, checks its SHA-256 and writes what loads here."""

SOURCE_FILE: Final = "source.json"
"""Beside converted weights: URL, SHA-256 and licence of the checkpoint that they were made of."""

_SAMPLE: Final = 1 << 16


def weights_home() -> Path:
    """Folder of converted weights: $RLT2I_WEIGHTS, or ~/.cache/rlt2i/weights."""
    return Path(os.environ.get("RLT2I_WEIGHTS", "~/.cache/rlt2i/weights")).expanduser()


def find_weights(path: str, *, of: str) -> str:
    """A folder to load from, or a name on the hub.

    Args:
        path: a folder, the name of a converted model below `weights_home()`, or "owner/name" on the hub.
        of: the part that needs them, for the message.

    Raises:
        FileNotFoundError: for a name that is none of the three, with the command that makes the weights.
    """
    for folder in (Path(path).expanduser(), weights_home() / path):
        if folder.exists():
            return str(folder)
    if path.count("/") == 1 and not path.startswith((".", "~", "/")):
        return path
    raise FileNotFoundError(
        f"{of}: there are no weights at {path!r} nor at {weights_home() / path}. Get them once with "
        f"`{CONVERT} {path}`, or give the folder of a converted model."
    )


def from_safetensors(kind: Any, source: str | Path, *, of: str, **options: Any) -> Any:
    """`kind.from_pretrained(source, ...)`, from safetensors alone: a pickle of weights can run any code.

    Args:
        kind: a model class of transformers.
        source: folder or hub name.
        of: the part that needs it, for the message.

    Raises:
        FileNotFoundError: when there are none, or the hub cannot be reached.
    """
    try:
        return kind.from_pretrained(source, use_safetensors=True, **options)
    except OSError as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{of}: no safetensors of {kind.__name__} could be read at {str(source)!r} ({first}). Pickled weights "
            "(.bin, .pt) are never loaded. Fetch a revision with safetensors where there is a network (hf download), "
            f"or convert the released checkpoint with `{CONVERT}`, and give the folder."
        ) from error


def weights_identity(path: str) -> str:
    """What tells two sets of weights apart: a hub name as it is, a folder by size and samples of its files.

    Reading gigabytes for a log entry would be slow; ends and middle of every file are enough to notice a
    swap.
    """
    roots = [folder for folder in (Path(path).expanduser(), weights_home() / path) if folder.exists()]
    if not roots:
        return path
    digest = hashlib.sha256()
    files = sorted(roots[0].rglob("*.safetensors")) if roots[0].is_dir() else [roots[0]]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            for start in (0, size // 2, max(0, size - _SAMPLE)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return f"{roots[0].name}@{digest.hexdigest()[:16]}"


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 convolutions: thresholds do not survive them."""
    with (
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        yield
