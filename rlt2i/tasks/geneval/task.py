"""GenEval as a task: training prompts on the fly, the official 553 held out."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import numpy as np
from attrs.validators import instance_of

from rlt2i.config import neutral
from rlt2i.rewards.geneval_rules import TAGS
from rlt2i.seeds import derive_seed
from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.tasks.geneval.prompts import GenEvalPrompt, draw, held_out_keys, official_prompts
from rlt2i.tasks.geneval.questions import with_questions

FLOW_GRPO_MIX = {
    "position": 7,
    "counting": 5,
    "color_attr": 3,
    "colors": 1,
    "two_object": 1,
    "single_object": 0,
}
"""Shares of the categories in Flow-GRPO's 50,000 training prompts."""


@attrs.frozen(kw_only=True)
class GenEvalTask(Task):
    """Prompts about COCO's objects: how many, in which colour, where.

    Training never asks for the picture of an official prompt: not with the objects in the other order, and
    not with the relation said from the other side. That leaves 160 counting prompts, so a long run sees each of
    them often.

    Attributes:
        mix: category -> its share of the training prompts. All 80 single objects are held out, so their share
            is 0.
        questions: give every prompt atomic questions too, which `GenEval2Reward` asks its judge. They are ours, about
            GenEval's prompts: scores on them are not scores on GenEval 2.
    """

    mix: Mapping[str, float] = attrs.field(factory=FLOW_GRPO_MIX.copy)
    questions: bool = neutral(False, validator=instance_of(bool))

    @mix.validator
    def _check_mix(self, _: object, value: Mapping[str, float]) -> None:
        unknown = sorted(set(value) - set(TAGS))
        if unknown:
            raise ValueError(f"GenEvalTask(mix): {unknown} are no GenEval categories. Use {', '.join(TAGS)}.")
        if value.get("single_object"):
            raise ValueError(
                "GenEvalTask(mix): the official prompts hold all 80 single objects, so none is left to train "
                "on. Set single_object to 0."
            )
        if min(value.values(), default=0) < 0 or sum(value.values()) <= 0:
            raise ValueError(f"GenEvalTask(mix={dict(value)}): shares must be >= 0, and at least one above 0.")

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"tag", "include", "prompt"} | ({"vqa_list", "skills"} if self.questions else set()))

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        shares = np.array([self.mix.get(tag, 0.0) for tag in TAGS], dtype=float)
        bounds = np.cumsum(shares / shares.sum())
        held_out = held_out_keys()
        prompts = []
        for number in range(start, start + count):
            rng = np.random.default_rng(derive_seed(seed, "geneval", number))
            tag = TAGS[min(int(np.searchsorted(bounds, rng.random(), side="right")), len(TAGS) - 1)]
            prompt = draw(tag, rng)
            while prompt.key in held_out:
                prompt = draw(tag, rng)
            prompts.append(self._task_prompt(prompt))
        return prompts

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        """All 553 (or repetitions of them, for several images each), or equally many of each category."""
        prompts = official_prompts()
        repeats, rest = divmod(count, len(prompts))
        if not rest:
            return [self._task_prompt(p) for p in prompts] * repeats
        by_tag = [[p for p in prompts if p.tag == tag] for tag in TAGS]
        per_tag, uneven = divmod(count, len(TAGS))
        most = min(map(len, by_tag))
        if uneven or per_tag > most:
            raise ValueError(
                f"GenEvalTask.eval_prompts({count}): use a multiple of {len(prompts)} for the official set, "
                f"or a multiple of {len(TAGS)} up to {len(TAGS) * most} for equally many of each category."
            )
        in_turn = zip(*(tag[:per_tag] for tag in by_tag), strict=True)
        return [self._task_prompt(p) for members in in_turn for p in members]

    def _task_prompt(self, prompt: GenEvalPrompt) -> TaskPrompt:
        metadata = with_questions(prompt.metadata) if self.questions else prompt.metadata
        return TaskPrompt(text=prompt.text, metadata=metadata, core=prompt.core, category=prompt.tag)
