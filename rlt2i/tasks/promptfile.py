"""Your own prompts: a text file with one per line, or JSON lines with the data that a reward needs."""

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
"""Without a file of its own, evaluation gets every tenth prompt of the training file."""


@attrs.frozen(kw_only=True)
class PromptFileTask(Task):
    """Prompts from files. Training shuffles them and shows each once per pass.

    A `.txt` file holds one prompt per line. A row of a `.jsonl` file is an object with `prompt`; `core` (a list of
    phrases) and `category` are used where they are there, and the whole row is the metadata that a reward sees.

    Attributes:
        train: file of training prompts.
        evaluation: file of held-out prompts; empty holds out every tenth prompt of `train`, never trained on.
        image_size: side of the images in pixels.
    """

    train: str = attrs.field()
    evaluation: str = ""
    image_size: int = attrs.field(default=512, validator=validators.ge(1))

    @train.validator
    def _check_train(self, _: object, value: str) -> None:
        _check_suffix(value)

    def __attrs_post_init__(self) -> None:
        if self.evaluation:
            _check_suffix(self.evaluation)

    @property
    def provides(self) -> frozenset[str]:
        kept, held_out = self._split()
        return frozenset.intersection(*(frozenset(p.metadata) for p in (*kept, *held_out)))

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        return shuffled(self._split()[0], seed=seed, start=start, count=count)

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        return balanced(self._split()[1], count, of="PromptFileTask")

    def _split(self) -> tuple[tuple[TaskPrompt, ...], tuple[TaskPrompt, ...]]:
        """(training, held-out) prompts; the files are read once, and again after they changed."""
        prompts = _read_current(Path(self.train).expanduser())
        if self.evaluation:
            held_out = _read_current(Path(self.evaluation).expanduser())
            both = {p.text for p in prompts} & {p.text for p in held_out}
            if both:
                raise ValueError(
                    f"PromptFileTask: {len(both)} prompts are in {self.train} and in {self.evaluation}, such as "
                    f"{min(both)!r}. Held-out prompts must not be trained on: remove them from one of the files."
                )
            return prompts, held_out
        held_out = prompts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        if not held_out:
            raise ValueError(
                f"PromptFileTask: {self.train} has {len(prompts)} prompts, too few to hold out every tenth. Give a "
                "file of other prompts as `evaluation`."
            )
        return tuple(p for i, p in enumerate(prompts) if (i + 1) % HELD_OUT_EVERY), held_out


def read_prompts(path: Path) -> tuple[TaskPrompt, ...]:
    """The prompts of a .txt or .jsonl file; blank lines do not count.

    Raises:
        FileNotFoundError: naming the file.
        ValueError: for a file without prompts, a prompt that is there twice, or a row that cannot be read; with the
            number of the line.
    """
    _check_suffix(str(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file; relative paths start at {Path.cwd()}.")
    prompts: dict[str, tuple[int, TaskPrompt]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        prompt = TaskPrompt(text=line.strip()) if path.suffix == ".txt" else _from_row(line, where)
        if prompt.text in prompts:
            first, _ = prompts[prompt.text]
            raise ValueError(f"{where}: {prompt.text!r} is already on line {first}. Keep one of them.")
        prompts[prompt.text] = (number, prompt)
    if not prompts:
        raise ValueError(f"{path}: holds no prompt. Write one per line.")
    return tuple(prompt for _, prompt in prompts.values())


def _from_row(line: str, where: str) -> TaskPrompt:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f'{where}: expected an object with a text under "prompt", got {line.strip()[:80]}.')
    core = row.get("core", [])
    if not isinstance(core, list) or not all(isinstance(phrase, str) for phrase in core):
        raise ValueError(f'{where}: "core" must be a list of phrases, got {core!r}.')
    category = row.get("category", row.get("tag", "all"))
    return TaskPrompt(text=row["prompt"].strip(), metadata=row, core=tuple(core), category=str(category))


def _check_suffix(path: str) -> None:
    if Path(path).suffix not in {".txt", ".jsonl"}:
        raise ValueError(f"prompt file {path!r}: expected .txt (one prompt per line) or .jsonl (one object per line).")


def _read_current(path: Path) -> tuple[TaskPrompt, ...]:
    return _read_once(path, path.stat().st_mtime_ns) if path.is_file() else read_prompts(path)


@functools.lru_cache(maxsize=8)
def _read_once(path: Path, modified: int) -> tuple[TaskPrompt, ...]:
    return read_prompts(path)
