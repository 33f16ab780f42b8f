"""Reward-weighted regression: the reward itself is the credit."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.credit.algebra import Advantage
from rlt2i.functional.advantages import reward_weights
from rlt2i.interfaces import CreditContext, Needs


@attrs.frozen(kw_only=True)
class RewardWeights(Advantage):
    """A = r, linear and without a baseline, as in Flow-GRPO's RWR (not exp(r / tau)).

    It compares nothing: a group whose rewards are all equal still pulls the policy towards its images, and a negative
    reward pushes it away from them. Shift the reward with `Affine` where that is not meant.
    """

    @property
    def needs(self) -> Needs:
        return Needs()

    def advantage(self, context: CreditContext) -> Tensor:
        return reward_weights(context.rewards.final, valid=context.rewards.valid).float()[:, None, None, None]
