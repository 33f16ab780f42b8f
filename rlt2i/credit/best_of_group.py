"""Best of group: imitate the best image of every prompt and forget the others."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.credit.algebra import Advantage
from rlt2i.functional.advantages import best_of_group
from rlt2i.interfaces import CreditContext


@attrs.frozen(kw_only=True)
class BestOfGroup(Advantage):
    """A = 1 for every rollout that ties for the best of its group, else 0: Flow-GRPO's labels of online SFT.

    Nobody is blamed, so a group whose rewards are all equal is imitated as a whole.
    """

    def advantage(self, context: CreditContext) -> Tensor:
        labels = best_of_group(context.rewards.final, context.group_size, valid=context.rewards.valid)
        return labels.float()[:, None, None, None]
