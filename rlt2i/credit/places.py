"""Regions that a reward judged, as one map per image: shared by advantages that resolve places."""

from __future__ import annotations

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import Advantage
from rlt2i.credit.region_maps import coverage
from rlt2i.functional.place_rewards import place_relative_advantage
from rlt2i.interfaces import CreditContext, Needs
from rlt2i.types import Region

JUDGED = Needs(
    groups=True,
    reward={"regions"},
    remedies={"regions": "Use one that judges regions, such as GenEvalReward, OCRReward, CellsReward or ShapesReward."},
)
"""What such an advantage needs."""


@attrs.frozen(kw_only=True)
class PlaceAdvantage(Advantage):
    """Rewards of places, each compared with the same place of the group's other images.

    Attributes:
        min_std: floor of a place's standard deviation, in the unit of the reward.
        clip: bound on the absolute advantage.
    """

    min_std: float = attrs.field(default=0.1, validator=validators.gt(0))
    clip: float = attrs.field(default=5.0, validator=validators.gt(0))

    @property
    def needs(self) -> Needs:
        return JUDGED

    def compared(self, places: Tensor, context: CreditContext) -> Tensor:
        """[B, 1, h, w] of the rewards of places [B, h, w]."""
        rewards = context.rewards
        advantage = place_relative_advantage(
            places, context.group_size, size=rewards.final, min_std=self.min_std, valid=rewards.valid
        )
        return advantage.clamp(-self.clip, self.clip).float()[:, None]


def judged_map(context: CreditContext, *, who: str) -> Tensor:
    """[B, h, w] in [-1, 1] on the token grid: the regions of each image, each by the size and sign of its judgement.

    Judgements of one sign add up where regions overlap, up to 1.

    Args:
        who: the part that asks, for the message.

    Raises:
        ValueError: when the reward returned no regions.
    """
    rewards = context.rewards
    if rewards.regions is None:
        raise ValueError(f"{who}: the reward says that it offers regions but returned none; check the reward.")
    maps = [_judged(regions, context.token_grid) for regions in rewards.regions]
    return torch.stack(maps).to(rewards.final.device)


def _judged(regions: tuple[Region, ...], grid: tuple[int, int]) -> Tensor:
    helped, hurt = torch.zeros(grid), torch.zeros(grid)
    for region in regions:
        total = helped if region.credit > 0 else hurt
        total += abs(region.credit) * coverage(region, grid)
    return helped.clamp(max=1) - hurt.clamp(max=1)
