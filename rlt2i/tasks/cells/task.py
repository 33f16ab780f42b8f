"""The cells world as a task: training prompts on the fly, held-out combinations for evaluation."""

from __future__ import annotations

import attrs
from attrs import validators

from rlt2i.seeds import derive_seed
from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.tasks.cells.prompts import CellsPrompt, split_prompts
from rlt2i.tasks.cells.vocabulary import GRIDS, side
from rlt2i.types import ImageSize, height_and_width


@attrs.frozen(kw_only=True)
class CellsTask(Task):
    """Prompts that name one cell or two; the categories are the named cells, in turn.

    The judged share of the canvas is named / grid²: 1/4 and 1/2 on 2 x 2 cells, 1/9 and 2/9 on 3 x 3.

    Attributes:
        grid: Cells along a side. 2 needs images of 32 pixels, 3 of 36.
        named: Cells that a prompt names.
    """

    grid: int = attrs.field(default=2, validator=validators.in_(GRIDS))
    named: int = attrs.field(default=1, validator=validators.in_((1, 2)))

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"grid", "cells"})

    def check_image_size(self, image_size: ImageSize) -> None:
        if height_and_width(image_size) != (side(self.grid), side(self.grid)):
            raise ValueError(
                f"train.image_size={image_size}: {self.grid} x {self.grid} cells have a canvas of {side(self.grid)} "
                f"pixels a side, which their verifier reads. Set train.image_size={side(self.grid)}."
            )

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        pools = list(split_prompts(self.grid, self.named)[0].values())
        drawn = []
        for number in range(start, start + count):
            members = pools[number % len(pools)]
            drawn.append(_task_prompt(members[derive_seed(seed, "prompt", number) % len(members)]))
        return drawn

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        prompts = eval_prompts(self.grid, self.named, count)
        return [attrs.evolve(_task_prompt(prompt), fixed=True) for prompt in prompts]


def eval_prompts(grid: int, named: int, count: int) -> list[CellsPrompt]:
    """The first `count` held-out prompts, in which the categories take turns, over and over.

    Raises:
        ValueError: `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"eval_prompts({count}): an evaluation needs images. Ask for at least 1.")
    pools = list(split_prompts(grid, named)[1].values())
    return [pools[i % len(pools)][i // len(pools) % len(pools[i % len(pools)])] for i in range(count)]


def _task_prompt(prompt: CellsPrompt) -> TaskPrompt:
    return TaskPrompt(text=prompt.text, metadata=prompt.metadata(), core=prompt.core, category=prompt.category)
