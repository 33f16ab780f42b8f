"""The folder of an evaluation: what may be killed at any moment, by whom it is written, and when it is complete.

fingerprint.json                     what decides the images; whatever differs is refused
suite.yaml                           the suite
images/00012-03.png                  prompt 12, image 3; each appears whole or not at all
parts/images.<shard>-of-<n>.jsonl    a line per image, appended by one process after the image is on disk
parts/scores-<reward>.<...>.jsonl    a line per score, likewise
rewards/<reward>.json                which reward it was
results.jsonl, report.json, report.md   everything by id, once it is complete
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from rlt2i.runs.files import create_text, plain_json, remove_partials, replacing

FINGERPRINT, SUITE, RESULTS = "fingerprint.json", "suite.yaml", "results.jsonl"
IMAGES, PARTS, REWARDS = "images", "parts", "rewards"

Item = TypeVar("Item")
Record = Mapping[str, Any]


class EvaluationError(ValueError):
    """The folder of an evaluation cannot be used as asked; names file, reason and way out."""


@attrs.frozen(kw_only=True)
class Shard:
    """This process's share: every `count`-th item from `index` on."""

    index: int = 0
    count: int = 1

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index}/{self.count}: the first is 0/{self.count}, the last below its count.")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`0/4`: the first of four.

        Raises:
            ValueError: on anything else.
        """
        index, slash, count = text.partition("/")
        if not slash or not index.isdigit() or not count.isdigit():
            raise ValueError(f"--shard {text}: write index/count, for example 0/4 for the first of four.")
        return cls(index=int(index), count=int(count))

    def of(self, items: Sequence[Item]) -> list[Item]:
        """The items of this shard; the shards of a count take each item once."""
        return [items[i] for i in range(self.index, len(items), self.count)]

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


@attrs.frozen(kw_only=True)
class Folder:
    """The files of one evaluation.

    Attributes:
        path: of the folder.
    """

    path: Path

    # -------------------------------------------------------------------------------------------- what it holds

    def fingerprint(self) -> dict[str, Any]:
        """What decided the images.

        Raises:
            EvaluationError: when there is no evaluation in the folder.
        """
        file = self.path / FINGERPRINT
        if not file.is_file():
            raise EvaluationError(
                f"{self.path}: no {FINGERPRINT}, so no evaluation. Make one: rlt2i eval RUN --suite NAME."
            )
        fingerprint: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return fingerprint

    def claim(self, fingerprint: Record, *, suite: str, finished: bool) -> None:
        """Make the folder that of this evaluation, or check that it is.

        Args:
            fingerprint: of the evaluation that is to go on here.
            suite: YAML of the suite.
            finished: all images are there, so the libraries and the device that would draw them do not matter.

        Raises:
            EvaluationError: when something else was evaluated here, naming what differs.
        """
        wanted = plain_json(fingerprint, "fingerprint")
        for name in (IMAGES, PARTS, REWARDS):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        remove_partials(self.path, of_the_dead=True)
        if not (self.path / FINGERPRINT).exists():
            create_text(self.path / SUITE, suite)
            create_text(self.path / FINGERPRINT, json.dumps(wanted, indent=1) + "\n")
        there = self.fingerprint()
        skipped = {"made_with"} if finished else set()
        different = list(_differences(there, wanted, skipped))
        if different:
            listed = "\n".join(f"  {name}: {old!r} there, {new!r} now" for name, old, new in different)
            raise EvaluationError(
                f"{self.path}: holds another evaluation, and images of two must not mix. What differs:\n{listed}\n"
                "Choose another folder with --out, or delete this one. What is saved in it can still be scored: "
                f"rlt2i eval {self.path} --score-only."
            )

    def part_files(self, kind: str) -> list[Path]:
        """The part files of all shards; `kind` is "images" or `scores_of(reward)`."""
        name = re.compile(rf"{re.escape(kind)}\.\d+-of-\d+\.jsonl")
        return sorted(path for path in (self.path / PARTS).glob("*.jsonl") if name.fullmatch(path.name))

    def records(self, kind: str) -> dict[str, dict[str, Any]]:
        """id -> record, over the part files of all shards.

        Raises:
            EvaluationError: when an id is there twice, or a file is damaged.
        """
        records: dict[str, dict[str, Any]] = {}
        where: dict[str, Path] = {}
        for path in self.part_files(kind):
            for record in read_part(path):
                name = record["id"]
                if name in records:
                    both = f"{where[name].name} and in {path.name}" if where[name] != path else f"{path.name} twice"
                    raise EvaluationError(
                        f"{self.path / PARTS}: {name} is in {both}, so it would count twice. Did two processes work on "
                        "one shard, or on shards of different counts at once? Delete one of the files; what is missing "
                        "then is made again."
                    )
                records[name], where[name] = record, path
        return records

    def reward_names(self) -> list[str]:
        """The rewards that were asked for here, in the order of their names."""
        return sorted(path.stem for path in (self.path / REWARDS).glob("*.json"))

    # ----------------------------------------------------------------------------------------------- images

    def image_path(self, name: str) -> Path:
        return self.path / IMAGES / f"{name}.png"

    def write_image(self, name: str, image: Tensor) -> str:
        """Keep a [3, H, W] uint8 image as PNG, whole or not at all.

        Returns:
            SHA-256 of its pixels.
        """
        from PIL import Image

        with replacing(self.image_path(name)) as partial:
            Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(partial, "PNG", compress_level=3)
        return pixels_sha256(image)

    def read_images(self, records: Sequence[Record]) -> Tensor:
        """[N, 3, H, W] uint8 of records.

        Raises:
            EvaluationError: when a file is missing or its pixels are not those that were recorded.
        """
        import numpy as np
        from PIL import Image

        images = []
        for record in records:
            path = self.image_path(record["id"])
            if not path.is_file():
                raise EvaluationError(
                    f"{path}: missing, though it was drawn. Put it back, or delete {path.parent.parent}."
                )
            with Image.open(path) as picture:
                image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
            if pixels_sha256(image) != record["sha256"]:
                raise EvaluationError(
                    f"{path}: other pixels than were drawn; edited or damaged. Put the original back, or delete "
                    f"{path.parent.parent} and evaluate again."
                )
            images.append(image)
        return torch.stack(images)


def pixels_sha256(image: Tensor) -> str:
    """SHA-256 of shape and pixels of a [3, H, W] uint8 image: the same for every PNG encoder."""
    digest = hashlib.sha256(str(tuple(image.shape)).encode())
    digest.update(image.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class PartWriter:
    """Appends JSON lines to the part file of one shard; a line that a kill cut short is dropped first.

    Raises:
        EvaluationError: when another process is writing the file.
    """

    def __init__(self, folder: Folder, kind: str, shard: Shard) -> None:
        self.path = folder.path / PARTS / f"{kind}.{shard}.jsonl"
        self._stream = self.path.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._stream.close()
            raise EvaluationError(
                f"{self.path}: another process is writing it. Wait until it ends, or give every process a shard of its "
                "own with --shard index/count."
            ) from error
        self._stream.seek(0)
        content = self._stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._stream.truncate(whole)

    def append(self, records: Iterable[Record]) -> None:
        """Have the records on disk before returning."""
        lines = [json.dumps(plain_json(record, "record"), ensure_ascii=False, allow_nan=False) for record in records]
        self._stream.write("".join(f"{line}\n" for line in lines).encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def read_part(path: Path) -> list[dict[str, Any]]:
    """The records of a part file, without a last line that is cut short.

    Raises:
        EvaluationError: naming a line that is no record.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            ok = isinstance(record, dict) and isinstance(record.get("id"), str)
        except ValueError:
            ok = False
        if not ok:
            raise EvaluationError(
                f"{path}, line {number}: no record; the file is damaged. Delete it and evaluate again."
            )
        records.append(record)
    return records


def scores_of(reward: str) -> str:
    """The kind of part file that holds the scores of a reward."""
    return f"scores-{reward}"


def check_complete(present: Iterable[str], wanted: Sequence[str], what: str) -> None:
    """The ids that are there must be exactly those that were asked for.

    Raises:
        EvaluationError: naming how many are missing or too many, with an example.
    """
    there, requested = set(present), set(wanted)
    assert len(requested) == len(wanted), "ids of a suite are distinct"
    for names, word in ((requested - there, "missing"), (there - requested, "not of this suite")):
        if names:
            raise EvaluationError(f"{what}: {len(names)} of {len(requested)} are {word}, such as {min(names)}.")


def _differences(old: Any, new: Any, skipped: Iterable[str], name: str = "") -> Iterable[tuple[str, Any, Any]]:
    """(dotted name, old, new) of every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            if name or key not in skipped:
                yield from _differences(old.get(key), new.get(key), (), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new
