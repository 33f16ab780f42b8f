"""Rewards whose scores can be worked out on paper, and rewards that misbehave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.types import Region


def batch_of(*greys: int, metadata: Sequence[Mapping[str, Any]] | None = None, ids: bool = False) -> RewardBatch:
    """Flat grey 4x4 images, one per value."""
    images = torch.tensor(greys, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    return RewardBatch(
        images=images,
        prompts=[f"grey {grey}" for grey in greys],
        metadata=list(metadata) if metadata is not None else [{} for _ in greys],
        ids=[f"seed/{i}" for i in range(len(greys))] if ids else None,
    )


@attrs.frozen(kw_only=True)
class Grey(Reward):
    """The grey value, 0 to 255. It counts its calls and the images that it was shown."""

    span = (0.0, 255.0)
    offers = frozenset({"maps", "regions"})

    shown: list[int] = attrs.field(init=False, factory=list, eq=False)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        scores = batch.images.float().mean(dim=(1, 2, 3))
        self.shown.append(len(scores))
        region = Region(box=(0.0, 0.0, 0.5, 1.0), credit=1.0, label="left", mask=torch.tensor([[True, False]]))
        return RewardOutput(
            scores=scores,
            valid=torch.ones(len(scores), dtype=torch.bool),
            components={"half": scores / 2},
            maps=scores[:, None, None].expand(-1, 2, 2) if "maps" in want else None,
            regions=[[region] for _ in scores] if "regions" in want else None,
            info=[{"prompt": prompt} for prompt in batch.prompts],
        )

    def fingerprint(self) -> dict[str, Any]:
        return {"reward": "Grey", "version": 1}


@attrs.frozen(kw_only=True)
class Bright(Reward):
    """Mean brightness in [0, 1], with a gradient."""

    span = (0.0, 1.0)
    offers = frozenset({"gradient"})

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        return output_of(self.score_tensor(batch.images.float() / 255, batch.prompts, batch.metadata))

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


@attrs.frozen(kw_only=True)
class Broken(Reward):
    """Does whatever `act` does with a batch."""

    act: Callable[[RewardBatch], Any]
    span = (0.0, 1.0)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        return self.act(batch)  # type: ignore[no-any-return]

    def fingerprint(self) -> dict[str, Any]:
        return {"reward": "Broken"}


@attrs.frozen(kw_only=True)
class Needy(Reward):
    """Reads metadata["value"]."""

    metadata_keys = frozenset({"value"})

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        return output_of([float(metadata["value"]) for metadata in batch.metadata])


def output_of(scores: Sequence[float] | Tensor, **fields: Any) -> RewardOutput:
    """All valid."""
    values = torch.as_tensor(scores, dtype=torch.float32)
    return RewardOutput(scores=values, valid=torch.ones(len(values), dtype=torch.bool), **fields)


def raises(error: Exception) -> Callable[[RewardBatch], Any]:
    """An act that fails."""

    def act(_: RewardBatch) -> Any:
        raise error

    return act


def mean_grey(images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> list[float | None]:
    """A plain function; black images it cannot judge."""
    return [float(image.float().mean()) if image.any() else None for image in images]


def one_too_few(images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
    return torch.zeros(len(images) - 1)


@attrs.frozen(kw_only=True)
class Dying(Reward):
    """Ends its process when it sees a white image."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        import os

        if int(batch.images.max()) == 255:
            os._exit(1)
        return output_of(batch.images.float().mean(dim=(1, 2, 3)))
