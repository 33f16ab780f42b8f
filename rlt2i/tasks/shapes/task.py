"""The shapes world as a task: training prompts on the fly, held-out combinations for evaluation."""

from __future__ import annotations

import attrs

from rlt2i.seeds import derive_seed
from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.tasks.shapes.prompts import ShapesPrompt, eval_prompts, split_prompts
from rlt2i.tasks.shapes.vocabulary import CANVAS, CATEGORIES
from rlt2i.types import ImageSize, height_and_width


@attrs.frozen(kw_only=True)
class ShapesTask(Task):
    """A mini-GenEval: six categories in turn, a random training combination of each.

    Four of the categories hold combinations out; the prompts of `single_object` and `counting` are all trained on, and
    evaluations tell the two apart.
    """

    @property
    def provides(self) -> frozenset[str]:
        return frozenset(field.name for field in attrs.fields(ShapesPrompt))

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        pool, _ = split_prompts()
        by_category = {c: [p for p in pool if p.category == c] for c in CATEGORIES}
        drawn = []
        for number in range(start, start + count):
            members = by_category[CATEGORIES[number % len(CATEGORIES)]]
            drawn.append(_task_prompt(members[derive_seed(seed, "prompt", number) % len(members)]))
        return drawn

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        per_category, rest = divmod(count, len(CATEGORIES))
        if rest:
            raise ValueError(
                f"ShapesTask.eval_prompts({count}): a balanced evaluation needs a multiple of the {len(CATEGORIES)} "
                f"categories. Use {max(1, per_category) * len(CATEGORIES)} or {(per_category + 1) * len(CATEGORIES)}."
            )
        pool = set(split_prompts()[0])
        return [attrs.evolve(_task_prompt(p), fixed=True, trained_on=p in pool) for p in eval_prompts(per_category)]

    def check_image_size(self, image_size: ImageSize) -> None:
        if height_and_width(image_size) != (CANVAS, CANVAS):
            raise ValueError(
                f"train.image_size={image_size}: the shapes world has a canvas of {CANVAS} pixels a side, which its "
                f"verifier reads. Set train.image_size={CANVAS}."
            )


def _task_prompt(prompt: ShapesPrompt) -> TaskPrompt:
    return TaskPrompt(text=prompt.text, metadata=prompt.metadata(), core=prompt.core, category=prompt.category)
