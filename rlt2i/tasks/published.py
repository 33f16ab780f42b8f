"""Published prompts that are for evaluation alone."""

from __future__ import annotations

import functools
from typing import Final

import attrs
from attrs import validators

from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.tasks.prompt_sets import PROMPT_SETS
from rlt2i.tasks.streams import balanced

EVALUATION_SETS: Final = ("drawbench", "geneval2", "partiprompts")
"""Sets without a training half."""


@attrs.frozen(kw_only=True)
class PublishedPrompts(Task):
    """A set of prompts that others report numbers on. It is fetched at first use, checked by SHA-256, and has
    nothing to train on.

    Attributes:
        set: "drawbench" (200 prompts; its authors state no licence), "partiprompts" (1,632; Apache-2.0) or "geneval2"
            (800 with questions for `GenEval2Reward`; CC BY-NC 4.0, so not for commercial use).
    """

    set: str = attrs.field(validator=validators.in_(EVALUATION_SETS))

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"vqa_list", "skills", "atom_count"} if self.set == "geneval2" else ())

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        raise ValueError(
            f"PublishedPrompts(set={self.set!r}): a benchmark; training on it would void it. Train on PickScoreTask() "
            "or on a prompt file of your own."
        )

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        """All of them in their order, or `count` taken from the categories in turn."""
        prompts = _read(self.set)
        return list(prompts) if count == len(prompts) else balanced(prompts, count, of="PublishedPrompts")


@functools.cache
def _read(name: str) -> tuple[TaskPrompt, ...]:
    return tuple(PROMPT_SETS[name].prompts())
