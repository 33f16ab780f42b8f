"""From a map of how much each place matters to a weight; shared by the allocations over space."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from rlt2i.functional.maps import mean_one


def relative_weight(maps: Tensor, *, mix: float, floor: float) -> Tensor:
    """(1 - mix) + mix mean-one(map / max + floor): how every allocation by region or saliency becomes a weight.

    Args:
        maps: [..., h, w], non-negative.
        mix: share of the map against the uniform map.
        floor: weight of a place where the map is 0, relative to its maximum before the floor.

    Returns:
        [..., h, w], mean one over space, and exactly one everywhere for a constant map (all zero included).
    """
    highest = maps.amax(dim=(-2, -1), keepdim=True)
    return (1 - mix) + mix * mean_one(maps / highest.clamp_min(1e-30) + floor, (-2, -1))


def to_grid(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """[N, h, w] -> [N, *grid]: averaged where the grid is coarser, interpolated where it is finer."""
    if maps.shape[1] >= grid[0] and maps.shape[2] >= grid[1]:
        return adaptive_avg_pool2d(maps[:, None], grid)[:, 0]
    return interpolate(maps[:, None], size=grid, mode="bilinear", align_corners=False)[:, 0]
