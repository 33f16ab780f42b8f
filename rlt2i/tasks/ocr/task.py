"""Text rendering as a task: train on some texts, evaluate on others."""

from __future__ import annotations

from pathlib import Path

import attrs

from rlt2i.inputs.textfiles import kept_until_changed, read_text, split_lines, user_path
from rlt2i.seeds import derive_seed
from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.tasks.ocr.prompts import CATEGORIES, draw_prompt, read_prompts
from rlt2i.tasks.ocr.published import PUBLISHED, fetch_published
from rlt2i.tasks.streams import prompt_key

MAX_EVAL = 4096
_EVAL_SEED = 417


@attrs.frozen(kw_only=True)
class OCRTask(Task):
    """Our own prompts: a scene and a text of one to four words, some with numbers; needs no network.

    Categories are one_word, two_words, three_words and number, in turn. No text of the evaluation is ever
    trained on.
    """

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"text"})

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        return [
            draw_prompt(
                CATEGORIES[number % len(CATEGORIES)],
                held_out=False,
                seed=derive_seed("ocr", "train", seed, number),
            )
            for number in range(start, start + count)
        ]

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        """All different; the first n are the same for every count of at least n."""
        if count > MAX_EVAL:
            raise ValueError(f"OCRTask.eval_prompts({count}): there are {MAX_EVAL} held-out prompts to draw from.")
        prompts: dict[str, TaskPrompt] = {}
        number = 0
        while len(prompts) < count:
            category = CATEGORIES[len(prompts) % len(CATEGORIES)]
            drawn = draw_prompt(category, held_out=True, seed=derive_seed("ocr", "eval", _EVAL_SEED, number))
            prompts.setdefault(drawn.text, drawn)
            number += 1
        return list(prompts.values())


@attrs.frozen(kw_only=True)
class OCRFileTask(Task):
    """Prompts from files: one a line, the text in double quotes. By default the sets that Flow-GRPO
    published.

    A published set is fetched the first time it is used, and checked by its hash.

    Attributes:
        train, test: a path, or the name of a published set.
    """

    train: str = "flow-grpo/ocr/train"
    test: str = "flow-grpo/ocr/test"

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"text"})

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        held_out = {prompt_key(prompt) for prompt in _read(self.test)}
        pool = [prompt for prompt in _read(self.train) if prompt_key(prompt) not in held_out]
        if not pool:
            raise ValueError(
                f"OCRFileTask: every prompt of {self.train} is in {self.test}; nothing is left to train on."
            )
        return [pool[derive_seed("ocr", seed, number) % len(pool)] for number in range(start, start + count)]

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        prompts = _read(self.test)
        if count > len(prompts):
            raise ValueError(f"OCRFileTask.eval_prompts({count}): {self.test} has {len(prompts)} prompts.")
        order = sorted(range(len(prompts)), key=lambda row: derive_seed("ocr", "eval", row))
        return [prompts[row] for row in sorted(order[:count])]


def _read(source: str) -> tuple[TaskPrompt, ...]:
    path = fetch_published(source) if source in PUBLISHED else user_path(source)
    if not path.is_file():
        raise ValueError(f"{source}: no such file, and no published set; those are {', '.join(PUBLISHED)}.")
    return _read_current(path, source)


@kept_until_changed
def _read_current(path: Path, source: str) -> tuple[TaskPrompt, ...]:
    return tuple(read_prompts(split_lines(read_text(path)), name=source))
