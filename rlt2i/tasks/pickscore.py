"""Prompts that people typed into a public demo (Pick-a-Pic), as the authors of Flow-GRPO selected them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs
from attrs import validators

from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.tasks.prompt_sets import PROMPT_SETS
from rlt2i.tasks.streams import balanced, shuffled

Subset = Literal["sfw", "full"]


@attrs.frozen(kw_only=True)
class PickScoreTask(Task):
    """Training and held-out prompts for preference rewards; both are fetched at first use and checked by SHA-256.

    Attributes:
        subset: "sfw", filtered by its publishers (15,470 prompts and 1,024 held out), or "full", Flow-GRPO's own
            (25,432 and 2,048), which holds sexual and violent prompts. Scores of the two cannot be compared.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"split": "subset"}

    subset: Subset = attrs.field(default="sfw", validator=validators.in_(("sfw", "full")))

    @property
    def provides(self) -> frozenset[str]:
        return frozenset()

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        return shuffled(_split(self.subset)[0], seed=seed, start=start, count=count)

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        return balanced(_split(self.subset)[1], count, of="PickScoreTask")


@functools.cache
def _split(subset: Subset) -> tuple[tuple[TaskPrompt, ...], tuple[TaskPrompt, ...]]:
    """(training, held-out); a training prompt that is also held out is dropped (the published sets share one)."""
    stem = "pickscore_sfw" if subset == "sfw" else "pickscore"
    held_out = PROMPT_SETS[f"{stem}_test"].prompts()
    texts = {p.text for p in held_out}
    training = [p for p in PROMPT_SETS[f"{stem}_train"].prompts() if p.text not in texts]
    return tuple(training), tuple(held_out)
