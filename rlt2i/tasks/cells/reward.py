"""The verifier of the cells world as a reward, and a reward that reads one corner without any words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.tasks.cells.prompts import CellsPrompt
from rlt2i.tasks.cells.verifier import Verdict, box, verify
from rlt2i.tasks.cells.vocabulary import cell_name, side
from rlt2i.types import Region


@attrs.frozen(kw_only=True)
class CellsReward(Reward):
    """strict_weight x strict + (1 - strict_weight) x partial of the named cells alone, in [0, 1].

    `info` names the cells that are wrong.

    Components: `strict` (0 or 1) and `partial`. Maps mark the named cells, which the prompt fixes before sampling:
    credit from them is an exact oracle of known area. Regions are the same cells, each with the sign of its own
    judgement: 1 where it is right, -1 where it earned nothing.

    Attributes:
        strict_weight: share of the strict score; the rest is partial credit, which separates near misses.
    """

    metadata_keys = frozenset({"grid", "cells"})
    offers = frozenset({"maps", "regions"})
    span = (0.0, 1.0)

    strict_weight: float = attrs.field(default=0.0, validator=[validators.ge(0.0), validators.le(1.0)])

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        prompts = [CellsPrompt.from_metadata(m) for m in batch.metadata]
        verdict = verify(batch.images, prompts)
        scores = self.strict_weight * verdict.strict + (1 - self.strict_weight) * verdict.partial
        return RewardOutput.all_valid(
            scores,
            components={"strict": verdict.strict, "partial": verdict.partial},
            maps=verdict.region.float() if "maps" in want else None,
            regions=_regions(verdict, prompts) if "regions" in want else None,
            info=[{"wrong": _wrong(s, p)} for s, p in zip(verdict.cells, prompts, strict=True)],
        )


def _wrong(scores: Tensor, prompt: CellsPrompt) -> list[str]:
    """The named cells that do not show what was asked for."""
    pairs = zip(scores.tolist(), prompt.named, strict=True)
    return [cell_name(prompt.grid, content.cell) for score, content in pairs if score < 1]


def _regions(verdict: Verdict, prompts: list[CellsPrompt]) -> list[list[Region]]:
    """Every named cell, with its partial score stretched to [-1, 1] as its sign and size."""
    regions = []
    for scores, prompt in zip(verdict.cells, prompts, strict=True):
        of_image = []
        for score, content in zip(scores.tolist(), prompt.named, strict=True):
            x1, y1, x2, y2 = box(prompt.grid, content.cell)
            mask = torch.zeros(verdict.region.shape[1:], dtype=torch.bool)
            mask[y1:y2, x1:x2] = True
            pixels = side(prompt.grid)
            of_image.append(
                Region(
                    box=(x1 / pixels, y1 / pixels, x2 / pixels, y2 / pixels),
                    credit=2 * score - 1,
                    label=cell_name(prompt.grid, content.cell),
                    mask=mask,
                )
            )
        regions.append(of_image)
    return regions


@attrs.frozen(kw_only=True)
class CornerReward(Reward):
    """How green the top left part of an image is; it reads a known share of the canvas, and no words.

    The mean over the part of G - (R + B) / 2, in [-1, 1]. Maps mark the part.

    Attributes:
        share: side of the part, as a share of the image's side; the judged area is its square.
    """

    offers = frozenset({"maps", "gradient"})
    span = (-1.0, 1.0)

    share: float = attrs.field(default=0.5, validator=[validators.gt(0.0), validators.le(1.0)])

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        images = batch.images.float() / 255
        scores = self.score_tensor(images, batch.prompts, batch.metadata)
        return RewardOutput.all_valid(
            scores,
            maps=self._map(images).expand(len(images), -1, -1) if "maps" in want else None,
        )

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        red, green, blue = images.unbind(dim=1)
        part = self._map(images)
        return ((green - (red + blue) / 2) * part).sum(dim=(1, 2)) / part.sum()

    def _map(self, images: Tensor) -> Tensor:
        """[H, W] one where the reward reads, zero elsewhere."""
        height, width = (max(1, round(self.share * edge)) for edge in images.shape[-2:])
        part = torch.zeros(images.shape[-2:], device=images.device)
        part[:height, :width] = 1
        return part
