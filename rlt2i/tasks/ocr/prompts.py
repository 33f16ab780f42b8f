"""Prompts with a text in quotes, drawn from our own words and scenes, or read from a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from rlt2i.inputs.quotes import quoted_texts
from rlt2i.inputs.textfiles import numbered_lines
from rlt2i.seeds import derive_seed
from rlt2i.tasks.base import TaskPrompt
from rlt2i.tasks.ocr.vocabulary import ADJECTIVES, FIXED, NOUNS, SCENES, VERBS

HELD_OUT_SHARE = 0.1
"""Of all texts; which ones is a function of the text alone."""

_PATTERNS: dict[str, Callable[[random.Random], str]] = {
    "one_word": lambda draw: draw.choice(NOUNS + ADJECTIVES + VERBS),
    "two_words": lambda draw: f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}",
    "three_words": lambda draw: (
        f"{draw.choice(VERBS)} the {draw.choice(NOUNS)}"
        if draw.random() < 0.5
        else f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)} {draw.choice(NOUNS)}"
    ),
    "number": lambda draw: draw.choice(FIXED).format(n=draw.randint(10, 99), m=draw.randint(1, 9)),
}
CATEGORIES = tuple(_PATTERNS)


def is_held_out(text: str) -> bool:
    """Whether a text belongs to the evaluation; RL never asks for it, in whatever scene or case."""
    return derive_seed("ocr", "split", " ".join(text.lower().split())) % 1000 < 1000 * HELD_OUT_SHARE


def draw_prompt(category: str, *, held_out: bool, seed: int) -> TaskPrompt:
    """One prompt of a category and a side of the split, as a function of the seed."""
    draw = random.Random(seed)
    while True:
        text = _styled(_PATTERNS[category](draw), draw)
        if is_held_out(text) == held_out:
            scene = draw.choice(SCENES).strip()
            return as_task_prompt(scene.replace("{text}", text) + ".", text, category)


def _styled(text: str, draw: random.Random) -> str:
    return text.upper() if draw.random() < 0.3 else text


def as_task_prompt(prompt: str, text: str, category: str) -> TaskPrompt:
    """The record of a prompt whose quoted text is `text`."""
    return TaskPrompt(text=prompt, metadata={"text": text}, core=(text,), category=category)


def read_prompts(lines: Iterable[str], *, name: str) -> list[TaskPrompt]:
    """One prompt per line, each with its text in double quotes of any kind; the first quoted text counts.

    Raises:
        ValueError: naming the line without one, now rather than in the middle of a run.
    """
    prompts = []
    for line in numbered_lines("\n".join(lines), name):
        quotes = quoted_texts(line.text)
        if not quotes:
            raise ValueError(
                f"{line.where}: no text in double quotes: {line.text[:80]!r}. "
                'Write for example: a sign that says "OPEN".'
            )
        prompts.append(as_task_prompt(line.text, quotes[0].text, "all"))
    if not prompts:
        raise ValueError(f"{name}: no prompts in it.")
    return prompts
