"""Group-relative advantage: the same praise or blame for every step and place of a rollout."""

from __future__ import annotations

from typing import Literal

import attrs
from torch import Tensor

from rlt2i.credit.algebra import StandardisedAdvantage
from rlt2i.functional.advantages import group_relative_advantage
from rlt2i.interfaces import CreditContext


@attrs.frozen(kw_only=True)
class GroupRelative(StandardisedAdvantage):
    """(r - mean of the group) / (std + eps), as in Flow-GRPO (arXiv 2505.05470).

    Attributes:
        std: "group", or "global" for the standard deviation of the whole gathered batch (Flow-GRPO's SD3.5 runs).
        clip: bound on the absolute advantage, applied before any weight.
        eps: added to the standard deviation.
    """

    std: Literal["group", "global"] = "group"

    def advantage(self, context: CreditContext) -> Tensor:
        rewards, valid = context.gather(context.rewards.final), context.gather(context.rewards.valid)
        advantage = group_relative_advantage(rewards, context.group_size, eps=self.eps, std=self.std, valid=valid)
        return self.bounded(context.local(advantage))[:, None, None, None]
