"""Small parts for evaluations, importable by name from a subprocess."""

from __future__ import annotations

import os
from typing import Any

import attrs
import torch

from rlt2i.evaluation.suites import Suite
from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.tasks.base import Task, TaskPrompt
from tests.helpers.toy import SIDE, QuadrantBrightness


@attrs.frozen(kw_only=True)
class Corners(Task):
    """Ten prompts in two categories: six bright ones and four dark ones. Asked for more, it repeats them."""

    image_size: int = SIDE

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"number"})

    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        return self.eval_prompts(count)

    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        return [
            TaskPrompt(
                text=f"corner {i % 10}", category="bright" if i % 10 < 6 else "dark", metadata={"number": i % 10}
            )
            for i in range(count)
        ]


@attrs.frozen(kw_only=True)
class Brightness(QuadrantBrightness):
    """`QuadrantBrightness`; of prompt 3 it can judge nothing. It dies where the environment says so."""

    metadata_keys = frozenset({"number"})

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        if "KILLED_BY_REWARD" in os.environ and "corner 5" in batch.prompts:
            os.kill(os.getpid(), 9)
        if "REWARD_IS_BROKEN" in os.environ and "corner 5" in batch.prompts:
            raise RuntimeError("CUDA error: out of memory")
        output = super().score(batch, want)
        lit = torch.tensor([metadata["number"] != 3 for metadata in batch.metadata])
        components = {"lit": (output.scores > 0.5).float(), "odd": output.scores.where(lit, torch.nan)}
        return attrs.evolve(output, valid=lit, components=components)

    def fingerprint(self) -> dict[str, Any]:
        return {"reward": "Brightness"}


@attrs.frozen(kw_only=True)
class Rank(QuadrantBrightness):
    """How many images of the same prompt are less bright; it wants whole prompts."""

    scope = "group"
    span = None

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        brightness = batch.images.float().mean(dim=(1, 2, 3))
        assert batch.groups is not None
        same = batch.groups[:, None] == batch.groups
        assert (same.sum(dim=1) == 3).all(), "not all images of a prompt"
        return RewardOutput(
            scores=(same & (brightness < brightness[:, None])).sum(dim=1).float(),
            valid=torch.ones(len(brightness), dtype=torch.bool),
        )

    def fingerprint(self) -> dict[str, Any]:
        return {"reward": "Rank"}


def suite(**changes: Any) -> Suite:
    """Ten prompts, three images each."""
    settings: dict[str, Any] = {
        "name": "corners",
        "task": Corners(),
        "prompts": 14,
        "images_per_prompt": 3,
        "rewards": {"brightness": Brightness(), "rank": Rank()},
        "headline": "brightness/lit",
        "overall": "categories",
        "steps": 3,
    }
    return Suite(**(settings | changes))
