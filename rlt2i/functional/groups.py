"""Groups of rollouts: who is compared with whom.

Everywhere else in rlt2i a group's G rollouts are adjacent, so a group size is enough. Scattered or ragged
groups (imported data, filtered batches) are named by integer group ids; both become one padded [P, G] layout
here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import rounding
from .transfer import on_host, to_device


class Groups(NamedTuple):
    """A padded layout of B samples in P groups of at most G.

    Attributes:
        rows: [P, G] long, the sample at each place (0 where there is none).
        present: [P, G] bool, whether there is one.
        places: [B] long, the place of each sample among all P G.
    """

    rows: Tensor
    present: Tensor
    places: Tensor

    def split(self, values: Tensor) -> Tensor:
        """[B, ...] -> [P, G, ...]; absent places hold sample 0 and must be masked."""
        return values[self.rows]

    def merge(self, values: Tensor) -> Tensor:
        """[P, G, ...] -> [B, ...], the inverse of `split`."""
        return values.flatten(0, 1)[self.places]


def group_layout(group_size: int | Tensor, batch: int, device: torch.device) -> Groups:
    """Lay out a batch by groups, on the host, where identities are known: the device is not asked.

    Args:
        group_size: G when the rollouts of one prompt are adjacent (G divides B), or [B] integer group ids.
        batch: B.
        device: where the layout will be used.

    Returns:
        Groups; with ids, groups are in ascending order of id and keep the order of their samples.

    Raises:
        ValueError: for a size that does not divide the batch, or ids that do not name a group for each of it.
    """
    if not isinstance(group_size, Tensor):
        if group_size < 1 or batch % group_size:
            raise ValueError(
                f"group_size={group_size} does not divide the batch of {batch} rewards. "
                "Pass whole groups, or integer group ids of shape [B]."
            )
        index = torch.arange(batch, device=device).view(-1, group_size)
        return Groups(index, torch.ones_like(index, dtype=torch.bool), index.flatten())
    if group_size.shape != (batch,) or group_size.is_floating_point():
        raise ValueError(
            f"group ids of shape {tuple(group_size.shape)} and {group_size.dtype} do not name the group of each "
            f"of {batch} rewards. Pass a [{batch}] integer tensor, or one group size for adjacent groups."
        )
    _, group, counts = on_host(group_size).unique(return_inverse=True, return_counts=True)
    order = torch.argsort(group, stable=True)
    place = torch.arange(batch) - (counts.cumsum(0) - counts)[group[order]]
    index = torch.zeros((len(counts), max(counts.tolist())), dtype=torch.long)
    present = torch.zeros_like(index, dtype=torch.bool)
    index[group[order], place] = order
    present[group[order], place] = True
    places = torch.empty(batch, dtype=torch.long)
    places[order] = group[order] * index.shape[1] + place
    return Groups(*(to_device(x, device) for x in (index, present, places)))


def masked_mean(values: Tensor, mask: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Mean of `values` where `mask` holds, keeping the reduced axes; 0 where it never does.

    Args:
        values: any shape; may hold nan where `mask` is False.
        mask: bool, broadcastable to `values`.
        dim: axes to reduce.
    """
    mask = mask.expand_as(values)
    total = torch.where(mask, values, 0).sum(dim=dim, keepdim=True)
    return total / mask.sum(dim=dim, keepdim=True).clamp(min=1)


def masked_std(values: Tensor, mask: Tensor, dim: int | tuple[int, ...], *, correction: int) -> Tensor:
    """Standard deviation of `values` where `mask` holds, keeping the reduced axes; 0 where too few are left.

    Deviations are squared in units of the largest one, so that rewards of any size (1e30, 1e-30) keep their spread. The
    unit is a power of two: it changes no digit.

    Args:
        values: any shape; may hold nan where `mask` is False.
        mask: bool, broadcastable to `values`.
        dim: axes to reduce.
        correction: 0 for the population std, 1 for the unbiased one.
    """
    mask = mask.expand_as(values)
    deviation = torch.where(mask, values - masked_mean(values, mask, dim), 0)
    exponent = torch.frexp(deviation.abs().amax(dim=dim, keepdim=True)).exponent.clamp(-100, 100)
    count = mask.sum(dim=dim, keepdim=True)
    squares = torch.ldexp(deviation, -exponent) ** 2
    return torch.ldexp(torch.sqrt(squares.sum(dim=dim, keepdim=True) / (count - correction).clamp(min=1)), exponent)


def group_mask(group_size: int | Tensor, rewards: Tensor, valid: Tensor | None) -> tuple[Groups, Tensor]:
    """Lay out a batch by groups and mark the rewards that count.

    Args:
        group_size: G for adjacent groups, or [B] integer group ids.
        rewards: [B, ...].
        valid: [B] bool, or None if every reward counts.

    Returns:
        The layout, and a mask [P, G, 1, ...] that broadcasts against `layout.split(rewards)`.

    Raises:
        ValueError: for `valid` of another shape or type than [B] bool; what `group_layout` raises.
    """
    batch = len(rewards)
    groups = group_layout(group_size, batch, rewards.device)
    mask = groups.present
    if valid is not None:
        if valid.shape != (batch,) or valid.dtype != torch.bool:
            raise ValueError(
                f"valid of shape {tuple(valid.shape)} and {valid.dtype} does not say which of {batch} rewards "
                f"count. Pass a [{batch}] bool tensor."
            )
        mask = mask & groups.split(valid.to(rewards.device))
    return groups, mask.view(mask.shape + (1,) * (rewards.ndim - 1))


def tied(split: Tensor, mask: Tensor, size: Tensor | None = None) -> Tensor:
    """Whether all rewards of a group that count are equal up to rounding (also true where none counts).

    Args:
        split: [P, G, ...] rewards by group.
        mask: bool, broadcastable to `split`.
        size: broadcastable to `split`, how large the numbers were that these were computed from, where that is more
            than their own size: a difference of two rewards near 20 carries the rounding of 20.

    Returns:
        [P, 1, ...] bool.
    """
    highest = torch.where(mask, split, -torch.inf).amax(dim=1, keepdim=True)
    lowest = torch.where(mask, split, torch.inf).amin(dim=1, keepdim=True)
    largest = torch.where(mask, (split if size is None else size).abs(), 0).amax(dim=1, keepdim=True)
    return highest - lowest <= rounding(largest)
