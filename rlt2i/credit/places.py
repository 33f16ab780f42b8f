"""Regions that a reward judged, as one map per image: shared by advantages that resolve places."""

from __future__ import annotations

import torch
from torch import Tensor

from rlt2i.credit.region_maps import coverage
from rlt2i.interfaces import CreditContext, Needs
from rlt2i.types import Region

JUDGED = Needs(
    groups=True,
    reward={"regions"},
    remedies={"regions": "Use one that judges regions, such as GenEvalReward, OCRReward, CellsReward or ShapesReward."},
)
"""What such an advantage needs."""


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
