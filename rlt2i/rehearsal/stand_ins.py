"""Stand-ins for what is not at hand: rewards whose weights must be fetched, prompt files that lie elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.types import Region

LEFT_HALF = (0.0, 0.0, 0.5, 1.0)


@attrs.frozen(kw_only=True)
class StandInReward(Reward):
    """How bright the left half of an image is against the right: smooth, differentiable, known where.

    It asks for the same metadata and offers the same outputs as the reward whose place it takes.

    Attributes:
        of: name of that reward.
        metadata_keys, offers, scope: as that reward's.
    """

    of: str
    metadata_keys: frozenset[str] = frozenset()
    offers: frozenset[str] = frozenset()
    scope: Literal["sample", "group"] = "sample"

    @classmethod
    def for_reward(cls, reward: Reward) -> StandInReward:
        """The stand-in for one reward."""
        return cls(
            of=type(reward).__name__, metadata_keys=reward.metadata_keys, offers=reward.offers, scope=reward.scope
        )

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        images = batch.images.float() / 255
        count, _, height, width = images.shape
        maps = torch.zeros(count, height, width)
        maps[:, :, : width // 2] = 1.0
        scores = self.score_tensor(images, batch.prompts, batch.metadata).cpu()
        regions = [[Region(box=LEFT_HALF, credit=math.copysign(1.0, float(s) - 0.5), label="left")] for s in scores]
        return RewardOutput.all_valid(
            scores,
            maps=maps if "maps" in want else None,
            regions=regions if "regions" in want else None,
        )

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        half = images.shape[-1] // 2
        contrast = images[..., :half].float().mean(dim=(1, 2, 3)) - images[..., half:].float().mean(dim=(1, 2, 3))
        return torch.sigmoid(4 * contrast)


@attrs.frozen(kw_only=True)
class StandInTask(Task):
    """A few prompts of our own in place of a set that is fetched when first used.

    Attributes:
        of: name of the task whose place it takes.
    """

    of: str

    @property
    def provides(self) -> frozenset[str]:
        return frozenset()

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        return [_PROMPTS[(seed + i) % 6] for i in range(start, start + count)]

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        return [_PROMPTS[6 + i % 2] for i in range(count)]


_PROMPTS = tuple(
    TaskPrompt(text=text)
    for text in (
        "a lighthouse above a stormy sea, oil painting",
        "two foxes asleep under a birch",
        "a red bicycle leaning on a stone wall",
        "portrait of an old sailor, soft light",
        "a bowl of lemons on a blue table",
        "city street in the rain at night",
        "a paper boat on a puddle",
        "three hot-air balloons over a valley",
    )
)
