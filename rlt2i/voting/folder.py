"""The folder that votes are kept in: every vote is on the disk before anything else happens.

<folder>/
    drawn.jsonl     a line per prompt: {"prompt", "images": [name, ...], "metadata": {...}}
    images/         <name>.png, named by what they show
    votes.jsonl     a line per vote: {"vote", "prompt", "left", "right", "choice", "time"}; or {"undo": vote, "time"}
    pairs.jsonl     what the votes come to, made anew after each: {"prompt", "winner", "loser", ...} for offline DPO
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from rlt2i.evaluation.pairs import PAIRS, write_png
from rlt2i.runs.files import flush, replace_text
from rlt2i.runs.metrics import append_lines
from rlt2i.voting.ballot import CHOICES, Choice

DRAWN, VOTES = "drawn.jsonl", "votes.jsonl"
_OTHER_WAY: Mapping[Choice, Choice] = {"left": "right", "right": "left", "tie": "tie", "skip": "skip"}


@attrs.frozen(kw_only=True)
class Slate:
    """A few images of one prompt.

    Attributes:
        prompt: text.
        images: a name each, a hash of the pixels.
        metadata: task data of the prompt, for the pair file.
    """

    prompt: str
    images: tuple[str, ...]
    metadata: Mapping[str, Any] = attrs.field(factory=dict, eq=False)


@attrs.frozen(kw_only=True)
class Vote:
    """What a person said of two images of a prompt, as they saw them."""

    vote: str
    prompt: str
    left: str
    right: str
    choice: Choice


@attrs.define
class VoteFolder:
    """Images and votes in a folder; read when opened, and written to at once. Several threads may use it.

    A vote belongs to two images and their prompt, wherever they come up again: a run that goes on from a checkpoint
    and draws the same images finds its votes.

    Attributes:
        path: made where it is not there.
    """

    path: Path
    _votes: dict[str, Vote] = attrs.field(factory=dict, init=False)
    _of_pair: dict[tuple[str, str, str], Vote] = attrs.field(factory=dict, init=False)
    _slates: dict[Slate, None] = attrs.field(factory=dict, init=False)
    _lock: threading.RLock = attrs.field(factory=threading.RLock, init=False)

    def __attrs_post_init__(self) -> None:
        (self.path / "images").mkdir(parents=True, exist_ok=True)
        for row in _sound_rows(self.path / DRAWN):
            if _is_slate(row):
                self._slates[_slate(row)] = None
        for row in _sound_rows(self.path / VOTES):
            if _is_vote(row):
                self._remember(Vote(**{key: row[key] for key in _VOTE}))
            elif isinstance(row.get("undo"), str):
                self._forget(row["undo"])
        if self._votes:
            self.write_pairs()

    @property
    def slates(self) -> list[Slate]:
        """All that were kept, in their order."""
        return list(self._slates)

    @property
    def votes(self) -> list[Vote]:
        """Those that stand, in their order."""
        with self._lock:
            return list(self._votes.values())

    def keep(self, images: Tensor, prompt: str, metadata: Mapping[str, Any]) -> Slate:
        """Keep [G, 3, H, W] uint8 images of a prompt; those that are there already are not written again."""
        names = []
        for image in images.cpu():
            names.append(hashlib.sha256(repr(tuple(image.shape)).encode() + image.numpy().tobytes()).hexdigest()[:32])
            if not self.file(names[-1]).is_file():
                write_png(self.file(names[-1]), image)
        slate = Slate(prompt=prompt, images=tuple(names), metadata=metadata)
        with self._lock:
            if slate not in self._slates:
                self._append(DRAWN, {"prompt": prompt, "images": names, "metadata": dict(metadata)})
                self._slates[slate] = None
        return slate

    def file(self, name: str) -> Path:
        """Where an image is; the name must be one that `keep` gave."""
        return self.path / "images" / f"{name}.png"

    def verdict(self, prompt: str, left: str, right: str) -> Choice | None:
        """What stands for two images of a prompt; None where nothing does."""
        with self._lock:
            vote = self._of_pair.get(_key(prompt, left, right))
        return None if vote is None else vote.choice if vote.left == left else _OTHER_WAY[vote.choice]

    def cast(self, prompt: str, left: str, right: str, choice: Choice) -> Vote:
        """Write a vote to the disk; it then stands, even where the pair file cannot be written.

        Raises:
            OSError: when the disk takes the vote, or the pair file, no more.
        """
        with self._lock:
            vote = Vote(vote=secrets.token_hex(8), prompt=prompt, left=left, right=right, choice=choice)
            self._append(VOTES, attrs.asdict(vote))
            self._remember(vote)
            self.write_pairs()
        return vote

    def undo(self, vote: Vote) -> None:
        """Take a vote back; that is written down, too."""
        with self._lock:
            self._append(VOTES, {"undo": vote.vote})
            self._forget(vote.vote)
            self.write_pairs()

    def pairs(self) -> list[dict[str, Any]]:
        """A row of the pair file for every vote that prefers one image, in the order of the votes."""
        metadata_of = {(s.prompt, name): s.metadata for s in self._slates for name in s.images}
        rows = []
        for vote in self.votes:
            if vote.choice in ("left", "right"):
                winner, loser = (vote.left, vote.right) if vote.choice == "left" else (vote.right, vote.left)
                files = {"winner": f"images/{winner}.png", "loser": f"images/{loser}.png"}
                rows.append({**metadata_of.get((vote.prompt, winner), {}), "prompt": vote.prompt, **files})
        return rows

    def write_pairs(self) -> None:
        """Bring the pair file up to the votes, as each of them does when it is cast."""
        replace_text(self.path / PAIRS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.pairs()))

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        file = self.path / name
        before = file.stat().st_size if file.is_file() else None
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            with file.open("a", encoding="utf-8") as stream:
                append_lines(stream, [json.dumps({**row, "time": now}, ensure_ascii=False)])
        except OSError:
            if file.is_file():  # what was written of the line must not be glued to the next one
                os.truncate(file, before or 0)
            raise
        if before is None:
            flush(self.path)

    def _remember(self, vote: Vote) -> None:
        key = _key(vote.prompt, vote.left, vote.right)
        if (before := self._of_pair.get(key)) is not None:
            del self._votes[before.vote]
        self._votes[vote.vote] = self._of_pair[key] = vote

    def _forget(self, name: str) -> None:
        vote = self._votes.pop(name, None)
        if vote is not None:
            del self._of_pair[_key(vote.prompt, vote.left, vote.right)]


_VOTE = tuple(field.name for field in attrs.fields(Vote))


def _key(prompt: str, left: str, right: str) -> tuple[str, str, str]:
    return prompt, min(left, right), max(left, right)


def _slate(row: Mapping[str, Any]) -> Slate:
    return Slate(prompt=row["prompt"], images=tuple(row["images"]), metadata=row["metadata"])


def _is_slate(row: Mapping[str, Any]) -> bool:
    images = row.get("images")
    return (
        isinstance(row.get("prompt"), str)
        and isinstance(row.get("metadata"), dict)
        and isinstance(images, list)
        and all(map(_is_name, images))
    )


def _is_vote(row: Mapping[str, Any]) -> bool:
    texts = all(isinstance(row.get(key), str) for key in _VOTE)
    return texts and row["choice"] in CHOICES and _is_name(row["left"]) and _is_name(row["right"])


def _is_name(name: Any) -> bool:
    """Whether `keep` could have given it: it becomes part of a path."""
    return isinstance(name, str) and re.fullmatch("[0-9a-f]{32}", name) is not None


def _sound_rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a file that hold an object; one that a crash cut short does not, and is ended."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if text and not text.endswith("\n"):
        with file.open("a", encoding="utf-8") as stream:
            append_lines(stream, [""])
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
