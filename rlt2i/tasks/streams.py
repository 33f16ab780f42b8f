"""What tasks with a fixed list of prompts share: an endless shuffled stream, and a balanced choice for evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlt2i.seeds import derive_seed
from rlt2i.tasks.base import TaskPrompt


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
