"""Fetching a published file: what is said where there is no network, and never half a file."""

from __future__ import annotations

import http.client
import os
import tempfile
import urllib.request
from pathlib import Path
from typing import Final

TIMEOUT: Final = 60.0
"""Seconds without an answer."""


def download(url: str, *, largest: int, target: Path, instead: str) -> bytes:
    """The content behind an address; nothing is kept.

    Args:
        url: of the file.
        largest: bytes; a larger file is refused.
        target: where a user without a network can put the file.
        instead: what else to do without one, such as "use OCRTask, which draws its own prompts".

    Raises:
        ValueError: when the file cannot be fetched, with the way out; or is too large.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = bytes(answer.read(largest + 1))
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", None) or error
        reason = getattr(cause, "strerror", None) or str(cause) or type(error).__name__
        raise ValueError(
            f"cannot fetch {url} ({reason}). Without a network, put the file at {target}, or {instead}."
        ) from None
    if len(content) > largest:
        raise ValueError(f"{url}: more than {largest / (1 << 20):.3g} MiB; the published file is not that large.")
    return content


def keep(content: bytes, target: Path, *, variable: str) -> Path:
    """Write a fetched file in one step.

    Args:
        variable: of the environment, which says where else it could be kept.

    Raises:
        ValueError: when the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as partial:
            partial.write(content)
        os.replace(partial.name, target)
    except OSError as error:
        raise ValueError(
            f"{target}: cannot keep a fetched file there ({error.strerror}). Name another folder in ${variable}."
        ) from None
    return target
