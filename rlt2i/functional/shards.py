"""Tensors of which every process holds a part: torch's DTensors, as full fine-tuning over several devices has them.

A part is a block of rows (dimension 0), as FSDP2 cuts: ceil(n / parts) rows each, the last ones fewer or none.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import attrs
from torch import Tensor


@attrs.frozen(kw_only=True)
class Rows:
    """What of a tensor is here.

    Attributes:
        start, stop: its rows.
        part, parts: which of how many parts this is.
        replica: which of several equal copies of that part.
        replicas: how many there are.
    """

    start: int
    stop: int
    part: int
    parts: int
    replica: int
    replicas: int


def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor, whose shape is that of the whole and whose data are a part."""
    return hasattr(tensor, "device_mesh")  # importing DTensor costs a second, which runs without shards are spared


def local(tensor: Tensor) -> Tensor:
    """The data that this process holds, not copied; the tensor itself where it holds all."""
    if not is_sharded(tensor):
        return tensor
    here: Tensor = tensor.detach().to_local()
    return here


def rows_of(tensor: Tensor) -> Rows:
    """Which rows of a DTensor this process holds."""
    assert is_sharded(tensor)
    mesh, parts, part, replicas, replica = tensor.device_mesh, 1, 0, 1, 0
    for dim, placement in enumerate(tensor.placements):
        size, rank = mesh.size(dim), mesh.get_local_rank(dim)
        if placement.is_shard(0):
            parts, part = parts * size, part * size + rank
        else:
            assert placement.is_replicate(), f"{placement}: only rows are ever cut"
            replicas, replica = replicas * size, replica * size + rank
    count = tensor.shape[0]
    step = -(-count // parts)
    start = min(count, part * step)
    return Rows(start=start, stop=min(count, start + step), part=part, parts=parts, replica=replica, replicas=replicas)


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `like`, as a view; all of it where `like` is no DTensor."""
    if not is_sharded(like):
        return whole
    assert whole.shape == like.shape, f"{whole.shape} against {like.shape}"
    rows = rows_of(like)
    return whole[rows.start : rows.stop]


def as_shard(part: Tensor, like: Tensor) -> Tensor:
    """A part as the DTensor whose part it is, sharing memory; the part itself where `like` is no DTensor."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
