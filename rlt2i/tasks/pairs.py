"""Preferences that were recorded: a file of prompts with two images each, of which one is better."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Final

import attrs
from attrs import validators

from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.tasks.streams import balanced, shuffled

HELD_OUT_EVERY: Final = 10
"""Without a task of its own, evaluation gets every tenth prompt of the file."""
ROLES: Final = ("winner", "loser")
MAKE: Final = "rlt2i pairs RECIPE FOLDER"


@attrs.frozen(kw_only=True)
class PairFileTask(Task):
    """Pairs from a file, one JSON object per line: {"prompt": text, "winner": "a.png", "loser": "b.png"}.

    Paths start at the folder of the file. A prompt may have several pairs. `core` (a list of phrases) and `category`
    are used where they are there, and the whole row is the metadata that a reward sees, with both paths made absolute.
    Every image is looked at when the file is read, so a training run cannot meet a missing one.

    Attributes:
        pairs: the .jsonl file.
        evaluation: a task whose held-out prompts evaluate (they need no images); None holds out every tenth prompt of
            the file with all its pairs.
        image_size: side of the images in pixels; all have it.
    """

    pairs: str = attrs.field()
    evaluation: Task | None = None
    image_size: int = attrs.field(default=512, validator=validators.ge(1))

    @pairs.validator
    def _check_pairs(self, _: object, value: str) -> None:
        if Path(value).suffix != ".jsonl":
            raise ValueError(f"PairFileTask(pairs={value!r}): expected a .jsonl file, one object per line.")

    def __attrs_post_init__(self) -> None:
        if self.evaluation is not None and self.evaluation.image_size != self.image_size:
            raise ValueError(
                f"PairFileTask(image_size={self.image_size}): its evaluation has images of "
                f"{self.evaluation.image_size} pixels. Use the same image_size for both."
            )

    @property
    def provides(self) -> frozenset[str]:
        """What training and held-out prompts both carry; the images are needed of training prompts alone."""
        kept, held_out = self._split()
        shared = _common(kept)
        if self.evaluation is not None:
            return (shared & self.evaluation.provides) | (shared & frozenset(ROLES))
        return shared & _common(held_out)

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        return shuffled(self._split()[0], seed=seed, start=start, count=count)

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        if self.evaluation is not None:
            return self.evaluation.eval_prompts(count)
        return balanced(self._split()[1], count, of="PairFileTask")

    def _split(self) -> tuple[tuple[TaskPrompt, ...], tuple[TaskPrompt, ...]]:
        """(pairs to train on, one pair of each held-out prompt)."""
        rows = _read_current(Path(self.pairs).expanduser().absolute(), self.image_size)
        if self.evaluation is not None:
            return rows, ()
        texts = list(dict.fromkeys(row.text for row in rows))
        held_out = dict.fromkeys(texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        if not held_out:
            raise ValueError(
                f"PairFileTask: {self.pairs} has {len(texts)} prompts, too few to hold out every tenth. Give a task "
                "with other prompts as `evaluation`."
            )
        first = {row.text: row for row in reversed(rows)}
        return tuple(row for row in rows if row.text not in held_out), tuple(first[text] for text in held_out)


def read_pairs(path: Path, image_size: int) -> tuple[TaskPrompt, ...]:
    """The pairs of a file in their order; blank lines do not count.

    Raises:
        FileNotFoundError: naming the file, and how to make one.
        ValueError: for a file without pairs, or a row that cannot be used; with the number of the line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such pair file; relative paths start at {Path.cwd()}. `{MAKE}` makes one from the images and "
            "the reward of a recipe."
        )
    found: dict[tuple[str, ...], tuple[int, TaskPrompt]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _row(line, where)
        files = [_image(path.parent, row[role], role, where, image_size) for role in ROLES]
        if files[0] == files[1]:
            raise ValueError(f"{where}: winner and loser are the same image, {row['winner']!r}. Drop the row.")
        prompt = TaskPrompt(
            text=row["prompt"].strip(),
            metadata={**row, **dict(zip(ROLES, files, strict=True))},
            core=tuple(row.get("core", ())),
            category=str(row.get("category", row.get("tag", "all"))),
        )
        key = (prompt.text, *files)
        if key in found:
            raise ValueError(f"{where}: this pair is already on line {found[key][0]}. Keep one of them.")
        found[key] = (number, prompt)
    if not found:
        raise ValueError(f"{path}: holds no pair. Write one JSON object per line, or make some: `{MAKE}`.")
    return tuple(prompt for _, prompt in found.values())


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got {line.strip()[:80]}.")
    for key in ("prompt", *ROLES):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f'{where}: expected a text under "{key}", got {row.get(key)!r}.')
    core = row.get("core", [])
    if not isinstance(core, list) or not all(isinstance(phrase, str) for phrase in core):
        raise ValueError(f'{where}: "core" must be a list of phrases, got {core!r}.')
    return row


def _image(folder: Path, name: str, role: str, where: str, image_size: int) -> str:
    """The absolute path of an image, after a look at its header."""
    from PIL import Image, UnidentifiedImageError

    file = (folder / name).absolute()
    if not file.is_file():
        raise ValueError(f"{where}: the {role} {name!r} is not there; paths start at {folder.absolute()}.")
    try:
        with Image.open(file) as opened:
            size = opened.size
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{where}: the {role} {name!r} is no image that can be read ({error}).") from None
    if size != (image_size, image_size):
        raise ValueError(
            f"{where}: the {role} {name!r} has {size[0]} x {size[1]} pixels, expected {image_size} x {image_size}. "
            "Crop and resize the images to squares of one size, or set image_size."
        )
    return str(file)


def _common(prompts: tuple[TaskPrompt, ...]) -> frozenset[str]:
    return frozenset.intersection(*(frozenset(p.metadata) for p in prompts))


def _read_current(path: Path, image_size: int) -> tuple[TaskPrompt, ...]:
    return _read_once(path, path.stat().st_mtime_ns, image_size) if path.is_file() else read_pairs(path, image_size)


@functools.lru_cache(maxsize=8)
def _read_once(path: Path, modified: int, image_size: int) -> tuple[TaskPrompt, ...]:
    return read_pairs(path, image_size)
