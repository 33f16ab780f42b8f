"""Random subset: every rollout trains its own draw of steps."""

from __future__ import annotations

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import Mask
from rlt2i.credit.steps import trained_steps
from rlt2i.functional.windows import random_subset
from rlt2i.interfaces import CreditContext
from rlt2i.seeds import generator


@attrs.frozen(kw_only=True)
class RandomSubset(Mask):
    """A fraction of the sampler's stochastic steps, drawn for each rollout (DanceGRPO, arXiv 2505.07818).

    Attributes:
        fraction: share of the steps to train; rounded, and never fewer than one step.
    """

    fraction: float = attrs.field(default=0.6, validator=[validators.gt(0.0), validators.le(1.0)])

    def mask(self, context: CreditContext) -> Tensor:
        steps, trajectory = trained_steps(context), context.trajectory
        count = max(1, round(self.fraction * len(steps)))
        mask = torch.zeros(trajectory.num_rollouts, trajectory.num_steps, 1, 1, dtype=torch.bool)
        for row, key in zip(mask, context.keys.tolist(), strict=True):
            chosen = random_subset(count=count, steps=len(steps), generator=generator("subset", key))
            row[[steps[place] for place in chosen]] = True
        return mask.to(trajectory.sigmas.device)
