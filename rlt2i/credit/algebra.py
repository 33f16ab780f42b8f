"""Credit is an algebra: one signed advantage, any number of non-negative allocations, any number of masks.

STAR is ``Product(advantage=GroupRelative(), allocations=(TextAttention(),))``. Weights multiply *advantages*, after
group normalisation: maps differ between rollouts, so weighting rewards before normalising would compare what cannot be
compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.interfaces import CreditAssigner, CreditContext, Needs
from rlt2i.types import Causality, Credit, latest_cause


class Advantage(ABC):
    """Rewards to a signed quantity per rollout; per step and place where the rewards resolve them."""

    @property
    def needs(self) -> Needs:
        return Needs(groups=True)

    def scored_steps(self, num_steps: int) -> tuple[int, ...]:
        """The steps whose clean predictions must be rewarded; none by default."""
        return ()

    @abstractmethod
    def advantage(self, context: CreditContext) -> Tensor:
        """[B, 1|T, 1|h, 1|w], signed, 0 for invalid rollouts. What resolves places is compared place by place: every
        group has mean 0 at each of them."""

    def mask(self, context: CreditContext) -> Tensor:
        """Where the advantage is to be counted: bool, broadcastable to [B, T, h, w]; everywhere, unless rollouts share
        what it speaks of."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=context.rewards.values.device)


@attrs.frozen(kw_only=True)
class StandardisedAdvantage(Advantage):
    """An advantage in standard deviations of a group, bounded.

    Attributes:
        clip: bound on the absolute advantage, applied before any weight.
        eps: added to the standard deviation.
    """

    clip: float = attrs.field(default=5.0, validator=validators.gt(0))
    eps: float = attrs.field(default=1e-4, validator=validators.gt(0))

    def bounded(self, advantage: Tensor) -> Tensor:
        """The same shape, float32."""
        return advantage.clamp(-self.clip, self.clip).float()


class Allocation(ABC):
    """Where and when an advantage applies: a weight of mean one over the axes it resolves."""

    @property
    def causality(self) -> Causality:
        """The latest information that the weight depends on."""
        return "exogenous"

    @property
    def needs(self) -> Needs:
        return Needs()

    @abstractmethod
    def weight(self, context: CreditContext) -> Tensor:
        """Broadcastable to [B, T, h, w], non-negative, finite."""


class Mask(ABC):
    """Which steps and places take part at all."""

    @abstractmethod
    def mask(self, context: CreditContext) -> Tensor:
        """bool, broadcastable to [B, T, h, w]."""


@attrs.frozen(kw_only=True)
class Product(CreditAssigner):
    """advantage x allocation x allocation x ..., on the steps that every mask keeps, the advantage's own included.

    Attributes:
        advantage: the signed factor.
        allocations: weights; the order does not matter.
        masks: all must keep a place for it to count.
    """

    advantage: Advantage
    allocations: tuple[Allocation, ...] = ()
    masks: tuple[Mask, ...] = ()

    @property
    def needs(self) -> Needs:
        return Needs.of_all(needs for _, needs in self.needs_by_part)

    @property
    def weight_needs(self) -> Needs:
        return Needs.of_all(a.needs for a in self.allocations)

    @property
    def needs_by_part(self) -> tuple[tuple[str, Needs], ...]:
        parts: tuple[Advantage | Allocation, ...] = (self.advantage, *self.allocations)
        return tuple((type(part).__name__, part.needs) for part in parts)

    def scored_steps(self, num_steps: int) -> tuple[int, ...]:
        return self.advantage.scored_steps(num_steps)

    def assign(self, context: CreditContext) -> Credit:
        with torch.no_grad():
            advantage = self.advantage.advantage(context)
            weight = advantage.new_ones(1, 1, 1, 1)
            for allocation in self.allocations:
                weight = weight * allocation.weight(context)
            mask = self.advantage.mask(context)
            for part in self.masks:
                mask = mask & part.mask(context)
        if len(self.allocations) > 1:  # a product of mean-one weights need not have mean one
            weight = weight / weight.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
        grid = torch.broadcast_shapes(advantage.shape[2:], weight.shape[2:], mask.shape[2:])
        return Credit(
            advantage=advantage.detach(),
            weight=weight.detach(),
            mask=mask,
            grid=(grid[0], grid[1]),
            causality=latest_cause([a.causality for a in self.allocations]),
        )
