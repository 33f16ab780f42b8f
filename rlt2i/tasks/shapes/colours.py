"""A judge of the shapes world with a gradient: are there as many pixels of each colour as the prompt asks for?

It sees neither shapes nor places nor how many objects share a colour, so it is a rough stand-in for the verifier, and a
policy that follows its gradient is bound to exploit that. It is here for objectives that need a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import attrs
import torch
from torch import Tensor

from rlt2i.functional.transfer import to_device
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.tasks.shapes.prompts import ShapesPrompt
from rlt2i.tasks.shapes.render import EXTENT, MAX_RADIUS, MIN_RADIUS, PALETTE_RGB, SQUARE_HALF_SIDE, TRIANGLE_BASE
from rlt2i.tasks.shapes.vocabulary import CANVAS, COLOURS, SHAPES

SHARPNESS: Final = 30.0
"""How exclusively a pixel belongs to the colour that its chroma points to most."""

_CHROMA: Final = PALETTE_RGB - PALETTE_RGB.mean(1, keepdim=True)
_STRENGTH: Final = _CHROMA.norm(dim=1)
_DIRECTION: Final = _CHROMA / _STRENGTH[:, None]

_UNIT_AREA: Final = (torch.pi, (2 * SQUARE_HALF_SIDE) ** 2, (1 + TRIANGLE_BASE) * EXTENT)
"""Of each shape at radius 1, in the order of SHAPES."""


class Range(NamedTuple):
    """The area, in pixels, that objects of the world can cover together."""

    low: float
    high: float


def colour_areas(images: Tensor) -> Tensor:
    """How many pixels show each colour of the palette, softly.

        area_k = sum_p q_pk s(a_pk)
        a_pk   = clamp(<chroma_p, d_k> / |chroma of k|, 0, 1),     q_p = softmax_k(30 <chroma_p, d_k>)

    where chroma is a pixel's RGB minus its mean, d_k the direction of colour k's, and s(a) = a^3 (10 - 15 a + 6 a^2)
    passes over faint tints and counts a half-covered pixel as a half.

    Args:
        images: [B, 3, H, W] floats in [0, 1].

    Returns:
        [B, 4], in the order of COLOURS; differentiable.
    """
    chroma = images - images.mean(dim=1, keepdim=True)
    along = torch.einsum("bchw,kc->bkhw", chroma, _there(_DIRECTION, images))
    alpha = (along / _there(_STRENGTH, images)[:, None, None]).clamp(0, 1)
    shown = alpha**3 * (10 - 15 * alpha + 6 * alpha**2)
    return (torch.softmax(SHARPNESS * along, dim=1) * shown).sum(dim=(2, 3))


def _there(constant: Tensor, images: Tensor) -> Tensor:
    return to_device(constant, images.device).to(images.dtype)


def area_of(shape: str, count: int) -> Range:
    """The area of one object among `count` in the pretraining distribution."""
    unit, largest = _UNIT_AREA[SHAPES.index(shape)], MAX_RADIUS[count - 1]
    return Range(unit * MIN_RADIUS**2, unit * largest**2)


def closeness(area: Tensor, wanted: Range) -> Tensor:
    """1 within the range, area / low below it, high / area above it; scalar in, scalar out."""
    return torch.minimum((area / wanted.low).clamp(max=1), wanted.high / area.clamp_min(wanted.high))


def colour_score(areas: Tensor, prompt: ShapesPrompt) -> Tensor:
    """Mean closeness over what the prompt names, times the share of the coloured area that was asked for.

    Args:
        areas: [4], of one image.
        prompt: objects of one named colour are judged by the area of that colour, all objects without one by the rest
            of the coloured area. Where every object has a colour, the rest was not asked for.

    Returns:
        Scalar in [0, 1].
    """
    objects = prompt.objects * prompt.count if prompt.category == "counting" else prompt.objects
    wanted: dict[str | None, list[Range]] = {}
    for shape, colour in objects:
        wanted.setdefault(colour, []).append(area_of(shape, prompt.count))
    of_colour = dict(zip(COLOURS, areas.unbind(), strict=True))  # an index on the host would be waited for
    named = sum((of_colour[colour] for colour in wanted if colour is not None), areas.new_zeros(()))
    rest = areas.sum() - named
    parts = [
        closeness(rest if colour is None else of_colour[colour], Range(*map(sum, zip(*ranges, strict=True))))
        for colour, ranges in wanted.items()
    ]
    requested = 1.0 if None in wanted else named / areas.sum().clamp_min(1e-6)
    return torch.stack(parts).mean() * requested


@attrs.frozen(kw_only=True)
class ShapesColours(Reward):
    """How close the areas of an image's colours are to what its prompt asks for, in [0, 1]; differentiable.

    Component: `coloured`, pixels of any colour of the palette.
    """

    metadata_keys = frozenset({"text", "category", "objects", "count", "relation"})
    offers = frozenset({"gradient"})
    span = (0.0, 1.0)

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        images = batch.images.float() / 255
        scores = self.score_tensor(images, batch.prompts, batch.metadata)
        return RewardOutput.all_valid(
            scores,
            components={"coloured": colour_areas(images).sum(dim=1)},
        )

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        if images.shape[1:] != (3, CANVAS, CANVAS):
            raise ValueError(
                f"ShapesColours: images are {list(images.shape)}; the areas are those of a {CANVAS} x {CANVAS} canvas. "
                "Use it with ShapesTask and policies of this world."
            )
        areas = colour_areas(images)
        requested = [ShapesPrompt.from_metadata(entry) for entry in metadata]
        return torch.stack([colour_score(row, prompt) for row, prompt in zip(areas, requested, strict=True)])
