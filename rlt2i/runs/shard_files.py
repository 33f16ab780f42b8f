"""Tensors of which every process holds a part, as files: each process writes its own, any number of processes reads.

    online.shard-00001-of-00004.safetensors

holds the rows of one process of each tensor. The header of a file says of every tensor the shape of the whole and where
its rows begin, so that files need no index. torch.distributed.checkpoint would do the same, but its processes agree on
a plan by sending each other pickles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlt2i.functional.shards import is_sharded, local, rows_of
from rlt2i.runs.files import save_tensors

_NAME = re.compile(r"([A-Za-z0-9_-]+)\.shard-(\d{5})-of-(\d{5})\.safetensors")
_PLACES = "rows"


class ShardError(ValueError):
    """Files that together are not what was written."""


def write_shards(folder: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write what this process holds of some tensors; processes that hold equal copies leave it to the first of them.

    Args:
        folder: the same for all processes.
        groups: file name -> tensor name -> DTensor, or a plain tensor that is the same everywhere.
    """
    for group, tensors in groups.items():
        rows = next(rows_of(tensor) for tensor in tensors.values() if is_sharded(tensor))
        if rows.replica:
            continue
        kept = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor) or rows.part == 0}
        places = {
            name: {"shape": list(tensor.shape), "start": rows_of(tensor).start if is_sharded(tensor) else 0}
            for name, tensor in kept.items()
        }
        file = folder / f"{group}.shard-{rows.part:05d}-of-{rows.parts:05d}.safetensors"
        save_tensors(
            file, {name: local(tensor) for name, tensor in kept.items()}, metadata={_PLACES: json.dumps(places)}
        )


def shard_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """File names by the group that they are parts of, in order; names of other files are left out.

    Raises:
        ShardError: when a group is not whole.
    """
    groups: dict[str, list[str]] = {}
    parts: dict[str, set[int]] = {}
    for name in sorted(names):
        if match := _NAME.fullmatch(name):
            groups.setdefault(match[1], []).append(name)
            parts.setdefault(match[1], set()).add(int(match[3]))
    for group, files in groups.items():
        if parts[group] != {len(files)}:
            raise ShardError(f"{group}: {len(files)} of {max(parts[group])} shards are there")
    return groups


class ShardedTensors(Mapping[str, Tensor]):
    """Whole tensors by name, put together from the files of a group when they are asked for, one at a time.

    Raises:
        ShardError: when a file is damaged or rows are missing.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.parts = len(files)
        self._places: dict[str, list[tuple[int, Any, list[int]]]] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt", device="cpu")  # stays open: it may be removed while we read
                places = json.loads((file.metadata() or {})[_PLACES])
                for name, place in places.items():
                    self._places.setdefault(name, []).append((int(place["start"]), file, list(place["shape"])))
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise ShardError(f"{path}: no shard of rlt2i ({type(error).__name__}: {error})") from error

    def __getitem__(self, name: str) -> Tensor:
        places = sorted(self._places[name], key=lambda place: place[0])
        shape = places[0][2]
        parts = [file.get_tensor(name) for _, file, _ in places]
        whole = parts[0] if not shape else torch.cat(parts)
        reached, gap = 0, False
        for (start, _, expected), part in zip(places, parts, strict=True):
            gap |= bool(shape) and len(part) > 0 and start != reached
            gap |= expected != shape
            reached += len(part) if shape else 0
        if gap or list(whole.shape) != shape:
            raise ShardError(f"{name}: its shards are rows of {list(whole.shape)}, the whole is {shape}")
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
