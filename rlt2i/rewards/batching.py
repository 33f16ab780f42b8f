"""Batches cut into rows and put together again: what caches, pools and servers have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.interfaces import CODE, Reward, RewardBatch, RewardOutput
from rlt2i.types import Region

REASON = "error"
"""Key of `RewardOutput.info` under which an invalid sample says why."""


def take_batch(batch: RewardBatch, rows: Sequence[int]) -> RewardBatch:
    """The images at the given positions, with everything that belongs to them."""
    index = torch.tensor(list(rows), dtype=torch.long)
    return RewardBatch(
        images=batch.images[index.to(batch.images.device)],
        prompts=[batch.prompts[i] for i in rows],
        metadata=[batch.metadata[i] for i in rows],
        groups=None if batch.groups is None else batch.groups[index.to(batch.groups.device)],
        ids=None if batch.ids is None else [batch.ids[i] for i in rows],
    )


def split_rows(batch: RewardBatch, size: int, *, scope: str = "sample") -> list[list[int]]:
    """Rows of consecutive chunks of at most `size` images; groups stay together if scores need that.

    Args:
        size: of a chunk; a group that is larger is one chunk.
        scope: `Reward.scope`.
    """
    count = len(batch.prompts)
    if scope != "group":
        return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    names = list(batch.prompts) if batch.groups is None else batch.groups.tolist()
    members: dict[Any, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    chunks: list[list[int]] = []
    for group in members.values():
        if chunks and len(chunks[-1]) + len(group) <= size:
            chunks[-1].extend(group)
        else:
            chunks.append(list(group))
    return chunks


def failed(count: int, reason: str) -> RewardOutput:
    """`count` samples that could not be judged: nan, never 0, so that no failure looks like a bad image."""
    return RewardOutput(
        scores=torch.full((count,), torch.nan),
        valid=torch.zeros(count, dtype=torch.bool),
        info=[{REASON: reason} for _ in range(count)],
    )


def with_reasons(info: Sequence[Mapping[str, Any]] | None, reasons: Sequence[str | None]) -> list[Mapping[str, Any]]:
    """Details with the reasons of invalid samples added; a reason that is already there stays."""
    rows = info or [{} for _ in reasons]
    pairs = zip(rows, reasons, strict=True)
    return [row if why is None or REASON in row else {**row, REASON: why} for row, why in pairs]


def merge(parts: Sequence[tuple[Sequence[int], RewardOutput]], count: int) -> RewardOutput:
    """One output of `count` samples from the outputs of some of their rows.

    A component that a part lacks is nan there; a map that a part lacks is 0. Rows in no part are invalid.

    Raises:
        ValueError: for maps of different sizes.
    """
    whole = failed(count, "this sample was not scored")
    names = dict.fromkeys(name for _, part in parts for name in part.components)
    components = {name: torch.full((count,), torch.nan) for name in names}
    regions: list[Sequence[Region]] | None = None
    maps: Tensor | None = None
    info: list[Mapping[str, Any]] = list(whole.info or ())
    for rows, part in parts:
        index = torch.tensor(list(rows), dtype=torch.long)
        whole.scores[index] = part.scores.float().cpu()
        whole.valid[index] = part.valid.cpu()
        for name, values in part.components.items():
            components[name][index] = values.float().cpu()
        if part.maps is not None:
            if maps is None:
                maps = torch.zeros(count, *part.maps.shape[1:])
            if maps.shape[1:] != part.maps.shape[1:]:
                raise ValueError(
                    f"maps of {list(part.maps.shape[1:])} and of {list(maps.shape[1:])} in one batch: a reward must "
                    "return maps of one size for images of one size."
                )
            maps[index] = part.maps.float().cpu()
        if part.regions is not None:
            regions = regions if regions is not None else [() for _ in range(count)]
        for i, row in enumerate(rows):
            info[row] = part.info[i] if part.info is not None else {}
            if regions is not None and part.regions is not None:
                regions[row] = part.regions[i]
    return RewardOutput(
        scores=whole.scores,
        valid=whole.valid,
        components=components,
        regions=regions,
        maps=maps,
        info=info if any(info) else None,
    )


def take_output(output: RewardOutput, rows: Sequence[int]) -> RewardOutput:
    """The samples at the given positions."""
    index = torch.tensor(list(rows), dtype=torch.long)
    return RewardOutput(
        scores=output.scores.cpu()[index],
        valid=output.valid.cpu()[index],
        components={name: values.cpu()[index] for name, values in output.components.items()},
        regions=None if output.regions is None else [output.regions[i] for i in rows],
        maps=None if output.maps is None else output.maps.cpu()[index],
        info=None if output.info is None else [output.info[i] for i in rows],
    )


def configuration(reward: Reward, *, without: Sequence[str] = (), **extra: Any) -> dict[str, Any]:
    """The fingerprint of a reward: its class, what can be set on it, and the fingerprints of rewards inside
    it.

    Args:
        reward: an attrs class. What it keeps between calls (workers, connections, caches) is no field to set,
            and stays out.
        without: fields that change how fast scores come, not what they are.
        extra: further entries.
    """
    fields: tuple[attrs.Attribute[Any], ...] = attrs.fields(type(reward))  # type: ignore[arg-type]
    kept = [field.name for field in fields if field.init and field.name not in without]
    return {
        "reward": type(reward).__name__,
        "settings": {name: _described(getattr(reward, name)) for name in kept},
        "code": CODE,
        **extra,
    }


def _described(value: Any) -> Any:
    if isinstance(value, Reward):
        return value.fingerprint()
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, frozenset | set):
        return sorted(map(str, value))
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
