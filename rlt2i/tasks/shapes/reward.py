"""The verifier of the shapes world as a reward."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.tasks.shapes.prompts import ShapesPrompt
from rlt2i.tasks.shapes.verifier import Detection, Rule, Verdict, verify
from rlt2i.tasks.shapes.vocabulary import CANVAS
from rlt2i.types import Region


@attrs.frozen(kw_only=True)
class ShapesReward(Reward):
    """strict_weight x strict + (1 - strict_weight) x partial, in [0, 1].

    `info` says what was seen in each image.

    Components: `strict` (0 or 1), `partial`, `objects` (how many are in the image), `objects_asked`. Maps mark the
    pixels of every coloured object: the ground truth of oracle credit.

    Attributes:
        rule: "exclusive" fails an image with any object that was not asked for. "geneval" ignores extras outside
            counting; under it a policy learns within minutes to fill the image with objects.
        strict_weight: share of the strict score; the rest is partial credit, which separates near misses.
    """

    metadata_keys = frozenset({"text", "category", "objects", "count", "relation"})
    offers = frozenset({"maps", "regions"})
    span = (0.0, 1.0)

    rule: Rule = attrs.field(default="exclusive", validator=validators.in_(("exclusive", "geneval")))
    strict_weight: float = attrs.field(default=0.5, validator=[validators.ge(0.0), validators.le(1.0)])

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        prompts = [ShapesPrompt.from_metadata(m) for m in batch.metadata]
        verdict = verify(batch.images.permute(0, 2, 3, 1), prompts, rule=self.rule)
        scores = self.strict_weight * verdict.strict + (1 - self.strict_weight) * verdict.partial
        return RewardOutput.all_valid(
            scores,
            components={
                "strict": verdict.strict,
                "partial": verdict.partial,
                "objects": verdict.num_objects.float(),
                "objects_asked": torch.tensor([float(p.count) for p in prompts]),
            },
            maps=verdict.region.float() if "maps" in want else None,
            regions=_regions(verdict, prompts) if "regions" in want else None,
            info=[{"seen": [_label(detection) for detection in detections]} for detections in verdict.detections],
        )


def _regions(verdict: Verdict, prompts: list[ShapesPrompt]) -> list[list[Region]]:
    """Every object with a sign: named shapes in their colour helped, everything else hurt."""
    return [
        [_region(detection, mask, prompt) for detection, mask in zip(detections, masks, strict=True)]
        for detections, masks, prompt in zip(verdict.detections, verdict.masks, prompts, strict=True)
    ]


def _region(detection: Detection, mask: Tensor, prompt: ShapesPrompt) -> Region:
    wanted = any(detection.shape == shape and colour in (None, detection.colour) for shape, colour in prompt.objects)
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    x1, y1, x2, y2 = (edge / CANVAS for edge in box)
    return Region(box=(x1, y1, x2, y2), credit=1.0 if wanted else -1.0, label=_label(detection), mask=mask)


def _label(detection: Detection) -> str:
    return f"{detection.colour or 'odd-coloured'} {detection.shape or 'blob'}"
