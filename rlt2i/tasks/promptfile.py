"""Your own prompts: a text file with one per line, or JSON lines with the data that a reward needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import attrs

from rlt2i.inputs.textfiles import has_suffix, kept_until_changed, parse_json, read_lines, user_path
from rlt2i.inputs.typography import is_blank
from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.tasks.streams import balanced, distinct, prompt_key, shuffled

HELD_OUT_EVERY: Final = 10
"""Without a file of its own, evaluation gets every tenth prompt of the training file."""


@attrs.frozen(kw_only=True)
class PromptFileTask(Task):
    """Prompts from files. Training shuffles them and shows each once per pass, or as often as the file repeats it.

    A `.txt` file holds one prompt per line. A row of a `.jsonl` file is an object with `prompt`; `core` (a list of
    phrases) and `category` are used where they are there, and the whole row is the metadata that a reward sees. Files
    are UTF-8. Prompts that differ in case, white space or invisible characters alone count as one prompt when training
    and held-out prompts are told apart.

    Attributes:
        train: file of training prompts.
        evaluation: file of held-out prompts; empty holds out every tenth prompt of `train`, never trained on.
    """

    train: str = attrs.field()
    evaluation: str = ""

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
        prompts = _read_current(user_path(self.train))
        if self.evaluation:
            held_out = distinct(_read_current(user_path(self.evaluation)))
            keys = set(map(prompt_key, held_out))
            both = [p.text for p in prompts if prompt_key(p) in keys]
            if both:
                raise ValueError(
                    f"PromptFileTask: {len(set(both))} prompts are in {self.train} and in {self.evaluation}, such as "
                    f"{min(both)!r}. Held-out prompts must not be trained on: remove them from one of the files."
                )
            return prompts, held_out
        held_out = distinct(prompts)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        if not held_out:
            raise ValueError(
                f"PromptFileTask: {self.train} has {len(distinct(prompts))} prompts, too few to hold out every tenth. "
                "Give a file of other prompts as `evaluation`."
            )
        keys = set(map(prompt_key, held_out))
        return tuple(p for p in prompts if prompt_key(p) not in keys), held_out


def read_prompts(path: Path) -> tuple[TaskPrompt, ...]:
    """The prompts of a .txt or .jsonl file; blank lines do not count.

    A prompt may be repeated with the same data: it is then trained on as often as the file says it.

    Raises:
        FileNotFoundError: naming the file.
        ValueError: for a file without prompts, one that is not UTF-8, a prompt that is there twice with different
            data, or a row that cannot be read; with the number of the line.
    """
    _check_suffix(str(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file; relative paths start at {Path.cwd()}.")
    prompts: list[TaskPrompt] = []
    first: dict[str, tuple[int, TaskPrompt]] = {}
    for line in read_lines(path):
        prompt = TaskPrompt(text=line.text) if has_suffix(path, ".txt") else _from_row(line.text, line.where)
        number, before = first.setdefault(prompt.text, (line.number, prompt))
        if before != prompt:
            raise ValueError(
                f"{line.where}: {prompt.text!r} is already on line {number}, with other data. Keep one of them."
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path}: holds no prompt. Write one per line.")
    return tuple(prompts)


def _from_row(line: str, where: str) -> TaskPrompt:
    row: Any = parse_json(line, where)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or is_blank(row["prompt"]):
        raise ValueError(f'{where}: expected an object with a text under "prompt", got {line[:80]}.')
    core = row.get("core", [])
    if not isinstance(core, list) or not all(isinstance(phrase, str) for phrase in core):
        raise ValueError(f'{where}: "core" must be a list of phrases, got {core!r}.')
    category = row.get("category", row.get("tag", "all"))
    return TaskPrompt(text=row["prompt"].strip(), metadata=row, core=tuple(core), category=str(category))


def _check_suffix(path: str) -> None:
    if not has_suffix(path, ".txt", ".jsonl"):
        raise ValueError(f"prompt file {path!r}: expected .txt (one prompt per line) or .jsonl (one object per line).")


_read_current = kept_until_changed(read_prompts)
