"""Preferences that were recorded: a file of prompts with two images each, of which one is better."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import attrs

from rlt2i.inputs.imagefiles import ImageFileError, read_picture
from rlt2i.inputs.textfiles import TextLine, has_suffix, kept_until_changed, read_objects, user_path
from rlt2i.inputs.typography import is_blank
from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.tasks.streams import balanced, prompt_key, shuffled
from rlt2i.types import ImageSize, height_and_width

HELD_OUT_EVERY: Final = 10
"""Without a task of its own, evaluation gets every tenth prompt of the file."""
ROLES: Final = ("winner", "loser")
MAKE: Final = "rlt2i pairs RECIPE FOLDER"


@attrs.frozen(kw_only=True)
class PairFileTask(Task):
    """Pairs from a file, one JSON object per line: {"prompt": text, "winner": "a.png", "loser": "b.png"}.

    Paths start at the folder of the file. A prompt may have several pairs. `core` (a list of phrases) and `category`
    are used where they are there, and the whole row is the metadata that a reward sees, with both paths made absolute.
    Every image is decoded when the file is read (upright, 16-bit grey scaled, transparency on white), so a training run
    cannot meet one that is missing or damaged. A pair whose images are alike is refused, and so is one that another row
    turns round. All images have one size, that of `train.image_size`.

    Attributes:
        pairs: the .jsonl file.
        evaluation: a task whose held-out prompts evaluate (they need no images); None holds out every tenth prompt of
            the file with all its pairs.
    """

    pairs: str = attrs.field()
    evaluation: Task | None = None

    @pairs.validator
    def _check_pairs(self, _: object, value: str) -> None:
        if not has_suffix(value, ".jsonl"):
            raise ValueError(f"PairFileTask(pairs={value!r}): expected a .jsonl file, one object per line.")

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

    def further_files(self) -> list[Path]:
        """The images of all pairs."""
        named = (str(pair.metadata[role]) for pair in self._file().pairs for role in ROLES)
        return [Path(path) for path in dict.fromkeys(named)]

    def check_image_size(self, image_size: ImageSize) -> None:
        if self.evaluation is not None:
            self.evaluation.check_image_size(image_size)
        height, width = self._file().size
        if (height, width) != height_and_width(image_size):
            raise ValueError(
                f"train.image_size={image_size}: the images of {self.pairs} have {width} x {height} pixels. Crop and "
                f"resize them to that size, or set train.image_size=[{height}, {width}]."
            )

    def _file(self) -> PairFile:
        return _read_current(user_path(self.pairs).absolute())

    def _split(self) -> tuple[tuple[TaskPrompt, ...], tuple[TaskPrompt, ...]]:
        """(pairs to train on, one pair of each held-out prompt)."""
        rows = self._file().pairs
        if self.evaluation is not None:
            return rows, ()
        keys = list(dict.fromkeys(map(prompt_key, rows)))
        held_out = dict.fromkeys(keys[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        if not held_out:
            raise ValueError(
                f"PairFileTask: {self.pairs} has {len(keys)} prompts, too few to hold out every tenth. Give a task "
                "with other prompts as `evaluation`."
            )
        first = {prompt_key(row): row for row in reversed(rows)}
        return tuple(row for row in rows if prompt_key(row) not in held_out), tuple(first[key] for key in held_out)


@attrs.frozen(kw_only=True)
class PairFile:
    """What a pair file holds.

    Attributes:
        pairs: in the order of the file; the metadata have absolute paths under "winner" and "loser".
        size: (height, width) of all images in pixels.
    """

    pairs: tuple[TaskPrompt, ...]
    size: tuple[int, int]


def read_pairs(path: Path) -> PairFile:
    """The pairs of a file; blank lines do not count.

    Raises:
        FileNotFoundError: naming the file, and how to make one.
        ValueError: for a file without pairs, or a row that cannot be used; with the number of the line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such pair file; relative paths start at {Path.cwd()}. `{MAKE}` makes one from the images and "
            "the reward of a recipe."
        )
    pairs: list[TaskPrompt] = []
    numbers: dict[tuple[str, str, str], int] = {}
    sizes: dict[tuple[int, int], str] = {}
    for line, row in read_objects(path):
        _check_row(row, line)
        images = [_image(path.parent, row[role], role, line.where) for role in ROLES]
        pair = TaskPrompt(
            text=row["prompt"].strip(),
            metadata={**row, **{role: str(image.file) for role, image in zip(ROLES, images, strict=True)}},
            core=tuple(row.get("core", ())),
            category=str(row.get("category", row.get("tag", "all"))),
        )
        _check_preference(prompt_key(pair), images, numbers, line)
        sizes |= {image.size: f"{line.where}: the {r} {row[r]!r}" for r, image in zip(ROLES, images, strict=True)}
        if len(sizes) > 1:
            (height, width), (there, across) = list(sizes)[:2]
            raise ValueError(
                f"{sizes[there, across]} has {across} x {there} pixels, the images before it have {width} x {height}. "
                "Crop and resize the images to squares of one size."
            )
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: holds no pair. Write one JSON object per line, or make some: `{MAKE}`.")
    return PairFile(pairs=tuple(pairs), size=next(iter(sizes)))


_read_current = kept_until_changed(read_pairs)


@attrs.frozen(kw_only=True)
class _Image:
    """A decoded image of a pair: where it is, (height, width), and a hash of its pixels."""

    file: Path
    size: tuple[int, int]
    digest: str


def _image(folder: Path, name: str, role: str, where: str) -> _Image:
    file = (folder / user_path(name)).absolute()
    try:
        pixels = read_picture(file)
    except ImageFileError as error:
        hint = f"; paths start at {folder.absolute()}" if not file.is_file() else ""
        raise ValueError(f"{where}: the {role} {name!r} {error}{hint}.") from None
    height, width, _ = pixels.shape
    return _Image(file=file, size=(height, width), digest=hashlib.sha256(pixels.tobytes()).hexdigest())


def _check_row(row: dict[str, Any], line: TextLine) -> None:
    for key in ("prompt", *ROLES):
        if not isinstance(row.get(key), str) or is_blank(row[key]):
            raise ValueError(f'{line.where}: expected a text under "{key}", got {row.get(key)!r}.')
    core = row.get("core", [])
    if not isinstance(core, list) or not all(isinstance(phrase, str) for phrase in core):
        raise ValueError(f'{line.where}: "core" must be a list of phrases, got {core!r}.')


def _check_preference(
    prompt: str, images: list[_Image], numbers: dict[tuple[str, str, str], int], line: TextLine
) -> None:
    """Refuse a pair that prefers nothing, one that is there already, and one that is there the other way round."""
    winner, loser = (image.digest for image in images)
    if winner == loser:
        same = "are the same image" if images[0].file == images[1].file else "are alike in every pixel"
        raise ValueError(f"{line.where}: winner and loser {same}, so nothing is preferred. Drop the row.")
    if (prompt, loser, winner) in numbers:
        raise ValueError(
            f"{line.where}: line {numbers[prompt, loser, winner]} prefers the same two images the other way round. "
            "Keep the row that is right, or neither."
        )
    first = numbers.setdefault((prompt, winner, loser), line.number)
    if first != line.number:
        raise ValueError(f"{line.where}: this pair is already on line {first}. Keep one of them.")


def _common(prompts: tuple[TaskPrompt, ...]) -> frozenset[str]:
    return frozenset.intersection(*(frozenset(p.metadata) for p in prompts))
