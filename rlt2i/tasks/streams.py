"""What tasks with a fixed list of prompts share: an endless shuffled stream, and a balanced choice for evaluation."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from rlt2i.inputs.typography import normalised
from rlt2i.seeds import derive_seed
from rlt2i.tasks.base import TaskPrompt


def prompt_key(prompt: TaskPrompt) -> str:
    """Equal for prompts that a reader takes for the same, however they were typed."""
    return _normalised(prompt.text)


_normalised = functools.lru_cache(maxsize=1 << 18)(normalised)
"""Of every prompt of a large file: the split is asked for at every batch."""


def distinct(prompts: Sequence[TaskPrompt]) -> tuple[TaskPrompt, ...]:
    """The first of every prompt that is there several times."""
    return tuple({prompt_key(p): p for p in reversed(prompts)}[key] for key in dict.fromkeys(map(prompt_key, prompts)))


def shuffled(prompts: Sequence[TaskPrompt], *, seed: int, start: int, count: int) -> list[TaskPrompt]:
    """Prompts number `start` to `start + count` of an endless stream that shows each prompt once per pass."""
    drawn: list[TaskPrompt] = []
    while len(drawn) < count:
        epoch, offset = divmod(start + len(drawn), len(prompts))
        order = np.random.default_rng(derive_seed(seed, "prompts", epoch)).permutation(len(prompts))
        drawn += [prompts[i] for i in order[offset : offset + count - len(drawn)]]
    return drawn


def balanced(prompts: Sequence[TaskPrompt], count: int, *, of: str) -> list[TaskPrompt]:
    """`count` of the prompts, taken from the categories in turn; a multiple of their number repeats all of them.

    Raises:
        ValueError: when there are too few.
    """
    repeats, rest = divmod(count, len(prompts))
    if repeats and rest:
        raise ValueError(
            f"{of}.eval_prompts({count}): there are {len(prompts)} held-out prompts. Use at most that many, or a "
            "multiple of it for several images each."
        )
    if repeats:
        return list(prompts) * repeats
    by_category: dict[str, list[TaskPrompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    turns = max(map(len, by_category.values()))
    in_turn = [members[i] for i in range(turns) for members in by_category.values() if i < len(members)]
    return in_turn[:count]
