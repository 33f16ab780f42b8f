"""Draws scenes of the shapes world.

An image holds what the prompt asks for, in saturated colours, and things that no prompt ever names and no
reward ever judges: a soft grey texture behind everything, and up to two darker grey distractors. Everything
unjudged is achromatic, so chroma alone separates what is judged from what is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from rlt2i.tasks.shapes.prompts import ShapesPrompt
from rlt2i.tasks.shapes.vocabulary import CANVAS, COLOURS, PALETTE, RELATIONS, SHAPES

PALETTE_RGB: Final = torch.tensor([PALETTE[colour] for colour in COLOURS], dtype=torch.float32) / 255
"""[4, 3] the palette as RGB in [0, 1]."""

MAX_OBJECTS: Final = 3
MAX_DISTRACTORS: Final = 2
MIN_RADIUS: Final = 3.6
MAX_RADIUS: Final = (5.0, 5.0, 4.5)
"""Largest radius, in pixels, for one, two and three objects."""

EXTENT: Final = 1.05
"""Half the side of an object's bounding box, in radii."""

GAP: Final = 2.0
"""Pixels left free between any two bounding boxes; two leave at least one clean pixel after antialiasing."""

SQUARE_HALF_SIDE: Final = 0.88
TRIANGLE_BASE: Final = 0.8
"""How far, in radii, the triangle's base lies below its centre; the apex lies one radius above it."""

BLOB, BAR, RING = range(3)


@attrs.frozen(kw_only=True, eq=False)
class Scenes:
    """The geometry of B images, in pixels; y grows downwards.

    Attributes:
        shape: [B, 3] long index into `SHAPES`, -1 where there is no object.
        colour: [B, 3] long index into `COLOURS`; meaningless where there is no object.
        centre: [B, 3, 2] x and y of each object.
        radius: [B, 3] of each object.
        distractor: [B, 2] long: blob 0, bar 1, ring 2, -1 where there is none.
        distractor_centre: [B, 2, 2] x and y of each distractor.
        distractor_radius: [B, 2]; nothing of a distractor is further from its centre.
        distractor_angle: [B, 2] of a bar, in radians.
    """

    shape: Tensor
    colour: Tensor
    centre: Tensor
    radius: Tensor
    distractor: Tensor
    distractor_centre: Tensor
    distractor_radius: Tensor
    distractor_angle: Tensor

    def __len__(self) -> int:
        return self.shape.shape[0]


def shape_coverage(shape: Tensor, centre: Tensor, radius: Tensor, *, side: int = CANVAS) -> Tensor:
    """Antialiased coverage of each pixel by a circle, square or triangle.

    Args:
        shape: [...] long index into `SHAPES`.
        centre: [..., 2] x and y in pixels.
        radius: [...] in pixels.
        side: Of the canvas, in pixels.

    Returns:
        [..., side, side] in [0, 1].
    """
    pixels = torch.arange(side, dtype=torch.float32) + 0.5
    x = pixels - centre[..., 0, None, None]
    y = pixels[:, None] - centre[..., 1, None, None]
    r = radius[..., None, None]
    circle = torch.hypot(x, y) - r
    square = torch.maximum(x.abs(), y.abs()) - SQUARE_HALF_SIDE * r
    height, half_base = (1 + TRIANGLE_BASE) * r, EXTENT * r
    slanted = (height * x.abs() - half_base * (y + r)) / torch.hypot(height, half_base)
    triangle = torch.maximum(y - TRIANGLE_BASE * r, slanted)
    kind = shape[..., None, None]
    signed_distance = torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))
    return (0.5 - signed_distance).clamp(0, 1)


def _distractor_coverage(kind: Tensor, centre: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """[...] blobs (soft discs), bars and rings -> [..., 32, 32] coverage in [0, 1]."""
    pixels = torch.arange(CANVAS, dtype=torch.float32) + 0.5
    x = pixels - centre[..., 0, None, None]
    y = pixels[:, None] - centre[..., 1, None, None]
    r, sine, cosine = radius[..., None, None], angle.sin()[..., None, None], angle.cos()[..., None, None]
    distance = torch.hypot(x, y)
    blob = (1 - (distance / r) ** 2).clamp(0, 1)
    along, across = cosine * x + sine * y, cosine * y - sine * x
    bar = (0.5 - torch.maximum(along.abs() - 0.9 * r, across.abs() - 0.8)).clamp(0, 1)
    ring = (0.5 - ((distance - 0.8 * r).abs() - 0.6)).clamp(0, 1)
    kind = kind[..., None, None]
    return torch.where(kind == BLOB, blob, torch.where(kind == BAR, bar, ring)) * (kind >= 0)


def _uniform(low: float | Tensor, high: float | Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(tuple(shape), generator=generator)


def _separated(centre: Tensor, reach: Tensor, present: Tensor) -> Tensor:
    """[N, K, 2] centres, [N, K] half box sides, [N, K] bool -> [N] bool: no two boxes come closer than GAP."""
    apart_NKK = (centre[:, :, None] - centre[:, None]).abs().amax(-1) > reach[:, :, None] + reach[:, None] + GAP
    ignore_NKK = ~(present[:, :, None] & present[:, None]) | torch.eye(present.shape[1], dtype=torch.bool)
    return (apart_NKK | ignore_NKK).all(-1).all(-1)


def sample_scenes(prompts: Sequence[ShapesPrompt], generator: torch.Generator) -> Scenes:
    """Draw one random scene for each prompt; every scene satisfies its prompt and shows nothing else in colour.

    Colours that a prompt leaves open are uniform; the objects of a counting prompt share one colour half of
    the time. Layouts are drawn by rejection: no overlap, everything inside the canvas, relations clear.

    Args:
        prompts: B prompts.
        generator: A CPU generator; the result is a function of its state.

    Returns:
        Geometry of B images.
    """
    batch = len(prompts)
    shape = torch.full((batch, MAX_OBJECTS), -1)
    colour = torch.randint(len(COLOURS), (batch, MAX_OBJECTS), generator=generator)
    same = torch.rand(batch, generator=generator) < 0.5
    direction = torch.zeros(batch, 2)
    for i, prompt in enumerate(prompts):
        objects = prompt.objects * prompt.count if prompt.category == "counting" else prompt.objects
        for j, (kind, wanted) in enumerate(objects):
            shape[i, j] = SHAPES.index(kind)
            if wanted is not None:
                colour[i, j] = COLOURS.index(wanted)
        if prompt.category == "counting" and same[i]:
            colour[i] = colour[i, 0]
        if prompt.relation is not None:
            direction[i] = torch.tensor(RELATIONS[prompt.relation], dtype=torch.float32)

    present = shape >= 0
    largest = torch.tensor(MAX_RADIUS)[present.sum(1) - 1]
    centre = torch.zeros(batch, MAX_OBJECTS, 2)
    radius = torch.zeros(batch, MAX_OBJECTS)
    todo = torch.arange(batch)
    while len(todo):
        r = _uniform(MIN_RADIUS, largest[todo, None], (len(todo), MAX_OBJECTS), generator)
        margin = (r * EXTENT + 1)[..., None]
        c = _uniform(margin, CANVAS - margin, (len(todo), MAX_OBJECTS, 2), generator)
        offset, d = c[:, 0] - c[:, 1], direction[todo]
        towards, sideways = (offset * d).sum(-1), (offset * d.flip(-1)).sum(-1).abs()
        related = (d == 0).all(-1) | ((towards > 4) & (towards >= 1.2 * sideways))
        accepted = _separated(c, r * EXTENT, present[todo]) & related
        centre[todo[accepted]], radius[todo[accepted]] = c[accepted], r[accepted]
        todo = todo[~accepted]

    return _with_distractors(shape, colour, centre, radius, generator)


def _with_distractors(
    shape: Tensor, colour: Tensor, centre: Tensor, radius: Tensor, generator: torch.Generator
) -> Scenes:
    """Place up to two distractors where there is room; one that finds none is left out."""
    batch = len(shape)
    kind = torch.randint(3, (batch, MAX_DISTRACTORS), generator=generator)
    kind[torch.arange(MAX_DISTRACTORS) >= torch.randint(3, (batch, 1), generator=generator)] = -1
    angle = _uniform(0.0, math.pi, (batch, MAX_DISTRACTORS), generator)
    size = _uniform(2.0, 3.2, (batch, MAX_DISTRACTORS), generator)
    spot = torch.zeros(batch, MAX_DISTRACTORS, 2)
    all_centres = torch.cat([centre, spot], 1)
    all_reach = torch.cat([radius * EXTENT, size], 1)
    all_present = torch.cat([shape >= 0, torch.zeros(batch, MAX_DISTRACTORS, dtype=torch.bool)], 1)
    for j in range(MAX_DISTRACTORS):
        slot = MAX_OBJECTS + j
        placed = torch.zeros(batch, dtype=torch.bool)
        for _ in range(12):
            candidate = all_centres.clone()
            margin = size[:, j, None] + 0.5
            candidate[:, slot] = _uniform(margin, CANVAS - margin, (batch, 2), generator)
            trial = all_present.clone()
            trial[:, slot] = True
            fits = _separated(candidate, all_reach, trial) & ~placed & (kind[:, j] >= 0)
            all_centres[fits] = candidate[fits]
            placed |= fits
        kind[~placed, j] = -1
        all_present[:, slot] = placed
    return Scenes(
        shape=shape,
        colour=colour,
        centre=centre,
        radius=radius,
        distractor=kind,
        distractor_centre=all_centres[:, MAX_OBJECTS:],
        distractor_radius=size,
        distractor_angle=angle,
    )


def render(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Draw scenes: texture first, then distractors, then objects with slightly jittered palette colours.

    Args:
        scenes: B scenes.
        generator: A CPU generator, for texture, grey levels and colour jitter.

    Returns:
        [B, 3, 32, 32] float32 RGB in [0, 1].
    """
    batch = len(scenes)
    images = background(batch, CANVAS, generator)

    grey = _uniform(0.25, 0.55, (batch, MAX_DISTRACTORS, 1, 1, 1), generator)
    spots = _distractor_coverage(
        scenes.distractor, scenes.distractor_centre, scenes.distractor_radius, scenes.distractor_angle
    )
    for j in range(MAX_DISTRACTORS):
        images = images.lerp(grey[:, j].expand_as(images), spots[:, j, None])

    coverage = shape_coverage(scenes.shape, scenes.centre, scenes.radius) * (scenes.shape >= 0)[..., None, None]
    return paint(images, coverage, scenes.colour, generator)


def background(batch: int, side: int, generator: torch.Generator) -> Tensor:
    """[B, 3, side, side] a soft grey texture, of a random grey."""
    base = _uniform(0.76, 0.92, (batch, 1, 1, 1), generator)
    waves = torch.randn(batch, 1, 5, 5, generator=generator) * 0.045
    texture = F.interpolate(waves, size=(side, side), mode="bicubic", align_corners=True)
    return (base + texture).clamp(0.70, 0.97).repeat(1, 3, 1, 1)


def paint(images: Tensor, coverage: Tensor, colour: Tensor, generator: torch.Generator) -> Tensor:
    """Lay objects over images, one after the other, in slightly jittered palette colours.

    Args:
        images: [B, 3, H, W].
        coverage: [B, N, H, W] in [0, 1], of each object.
        colour: [B, N] long index into `COLOURS`.
        generator: Source of the jitter.

    Returns:
        [B, 3, H, W].
    """
    jitter = _uniform(-0.03, 0.03, (*colour.shape, 3), generator)
    colours = (PALETTE_RGB[colour] + jitter).clamp(0, 1)[..., None, None]
    for j in range(colour.shape[1]):
        images = images.lerp(colours[:, j].expand_as(images), coverage[:, j, None])
    return images
