"""Win rate: only who beats whom counts, not by how much."""

from __future__ import annotations

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import Advantage
from rlt2i.functional.advantages import win_rate_advantage
from rlt2i.interfaces import CreditContext


@attrs.frozen(kw_only=True)
class WinRate(Advantage):
    """Group-relative advantage of the share of its group that a rollout beats (Pref-GRPO, arXiv 2508.20751).

    Attributes:
        pairwise: prefix of the reward terms of a judge that compares images: the term `<pairwise>/<j>` of a rollout is
            the probability that it beats rollout j of its group, nan (a tie) where the judge did not say. None
            compares the scores of a pointwise reward.
        eps: added to the standard deviation of the win rates.
    """

    pairwise: str | None = None
    eps: float = attrs.field(default=1e-4, validator=validators.gt(0))

    def advantage(self, context: CreditContext) -> Tensor:
        scores = context.rewards.final if self.pairwise is None else self._preferences(context)
        advantage = win_rate_advantage(scores, context.group_size, eps=self.eps, valid=context.rewards.valid)
        return advantage.float()[:, None, None, None]

    def _preferences(self, context: CreditContext) -> Tensor:
        """[P, G, G] probabilities that the row beats the column."""
        size, terms = context.group_size, context.rewards.terms
        names = [f"{self.pairwise}/{j}" for j in range(size)]
        missing = [name for name in names if name not in terms]
        if missing:
            raise ValueError(
                f"WinRate(pairwise={self.pairwise!r}): the reward has no term {missing[0]!r}; it has "
                f"{sorted(terms) or 'none'}. Use a reward that compares the images of a group, or leave pairwise out "
                "to compare scores."
            )
        beats = torch.stack([terms[name].float() for name in names], dim=1).view(-1, size, size)
        return torch.where(torch.isfinite(beats), beats, 0.5)
