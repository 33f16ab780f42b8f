"""Published prompt sets: fetched by URL, checked by hash, never shipped."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import attrs

from rlt2i.tasks.download import download, keep

_COMMIT = "ac4c86e8cae021841f1fde853d340e0db67690dd"
_FLOW_GRPO = f"https://raw.githubusercontent.com/yifan123/flow_grpo/{_COMMIT}/dataset/ocr"


@attrs.frozen(kw_only=True)
class PublishedFile:
    """A text file on the web.

    Attributes:
        url: pinned to a commit.
        digest: `sha256:<hex>`, or `git:<hex>`, the id that git gives to the content.
        size_limit: bytes; more is refused unread.
        licence: of the data.
    """

    url: str
    digest: str
    size_limit: int
    licence: str


PUBLISHED = {
    "flow-grpo/ocr/test": PublishedFile(
        url=f"{_FLOW_GRPO}/test.txt",
        digest="sha256:4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc",
        size_limit=1 << 20,
        licence="MIT (prompts written by GPT-4o)",
    ),
    "flow-grpo/ocr/train": PublishedFile(
        url=f"{_FLOW_GRPO}/train.txt",
        digest="git:3ce0521b77b0a9031191d66ecc36ebaaf27a3922",
        size_limit=16 << 20,
        licence="MIT (prompts written by GPT-4o)",
    ),
}
"""Name -> file. 1,018 prompts to test on and 19,653 to train on."""


def cache_folder() -> Path:
    """Where fetched files are kept: $RLT2I_CACHE, else rlt2i in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RLT2I_CACHE") or Path(home) / "rlt2i")


def digest_of(content: bytes, kind: str) -> str:
    """`sha256:<hex>` or `git:<hex>` of a file's content."""
    if kind == "git":
        header = f"blob {len(content)}\0".encode()
        return f"git:{hashlib.sha1(header + content, usedforsecurity=False).hexdigest()}"
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def fetch_published(name: str) -> Path:
    """The local copy of a published file, downloaded the first time.

    Raises:
        ValueError: when the name is unknown, the file cannot be fetched, or it is not the one that was
            published.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name!r} is no published prompt set. Known: {', '.join(PUBLISHED)}.")
    entry = PUBLISHED[name]
    kind = entry.digest.partition(":")[0]
    path = cache_folder() / "prompts" / f"{name.replace('/', '-')}.txt"
    if path.is_file() and digest_of(path.read_bytes(), kind) == entry.digest:
        return path
    try:
        content = download(
            entry.url, largest=entry.size_limit, target=path, instead="use OCRTask, which draws its own prompts"
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    digest = digest_of(content, kind)
    if digest != entry.digest:
        raise ValueError(f"{name}: {entry.url} is not the published file: {digest}, expected {entry.digest}.")
    return keep(content, path, variable="RLT2I_CACHE")
