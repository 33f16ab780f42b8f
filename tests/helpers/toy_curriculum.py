"""A reward with which one prompt has nothing left to teach."""

from __future__ import annotations

import attrs
import torch

from rlt2i.interfaces import RewardBatch, RewardOutput
from tests.helpers.toy import QuadrantBrightness


@attrs.frozen(kw_only=True)
class OneOfThreeIsSolved(QuadrantBrightness):
    """1 for every image of "bright corner 0"."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = super().score(batch, want)
        solved = torch.tensor([prompt.endswith("0") for prompt in batch.prompts])
        return attrs.evolve(output, scores=torch.where(solved, 1.0, output.scores))
