"""Region maps: praise what was right in a good image, blame what was wrong in a bad one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.spatial import relative_weight, to_grid
from rlt2i.functional.advantages import group_relative_advantage
from rlt2i.interfaces import CreditContext, Needs
from rlt2i.types import Causality, Region

_unit = [validators.ge(0.0), validators.le(1.0)]


@attrs.frozen(kw_only=True)
class RegionMaps(Allocation):
    """The regions that the reward judged, each with the sign of its own judgement.

    A weight has no sign; the advantage has. So a rollout above its group's mean is praised where a region helped its
    score, and one below is blamed where a region hurt it; regions that contradict their image are left out, as IAPO
    leaves out instances whose label contradicts the image's. A rollout without such a region, or at the mean, gets the
    uniform map. `Oracle` is the unsigned relative of this part, for rewards that return maps.

    Attributes:
        signs: "agreeing" as above; "all" takes every region by the size of its judgement, whatever the sign.
        mix: share of the region map against the uniform map.
        floor: weight of places outside every region, relative to the strongest place.
    """

    causality: Causality = attrs.field(default="outcome", init=False)

    signs: Literal["agreeing", "all"] = attrs.field(default="agreeing", validator=validators.in_(("agreeing", "all")))
    mix: float = attrs.field(default=0.5, validator=_unit)
    floor: float = attrs.field(default=0.02, validator=[validators.gt(0.0), validators.le(1.0)])

    @property
    def needs(self) -> Needs:
        return Needs(groups=True, reward={"regions"})

    def weight(self, context: CreditContext) -> Tensor:
        rewards = context.rewards
        if rewards.regions is None:
            raise ValueError("RegionMaps: the reward says that it offers regions but returned none; check the reward.")
        above = group_relative_advantage(rewards.final, context.group_size, valid=rewards.valid).sign().tolist()
        maps = [
            self._map(regions, sign, context.token_grid) for regions, sign in zip(rewards.regions, above, strict=True)
        ]
        stacked = torch.stack(maps).to(rewards.final.device)
        return relative_weight(stacked, mix=self.mix, floor=self.floor)[:, None]

    def _map(self, regions: Sequence[Region], sign: float, grid: tuple[int, int]) -> Tensor:
        """[h, w] sum of the regions that count, each by the size of its judgement."""
        total = torch.zeros(grid)
        for region in regions:
            if self.signs == "all" or region.credit * sign > 0:
                total += abs(region.credit) * coverage(region, grid)
        return total


def coverage(region: Region, grid: tuple[int, int]) -> Tensor:
    """[h, w] share of each cell that a region covers: by its mask, or by its box where it has none."""
    if region.mask is not None:
        return to_grid(region.mask.float().cpu()[None], grid)[0]
    x1, y1, x2, y2 = region.box
    return _overlap(y1, y2, grid[0])[:, None] * _overlap(x1, x2, grid[1])


def _overlap(low: float, high: float, cells: int) -> Tensor:
    """[cells] share of each of `cells` equal parts of [0, 1] that lies in [low, high]."""
    edges = torch.arange(cells + 1) / cells
    return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0) * cells
