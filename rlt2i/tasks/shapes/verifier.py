"""Reads an image of the shapes world and judges it against a prompt, exactly and without a network.

Everything that no prompt names is grey, so the verifier looks at *chroma* alone: a pixel's RGB minus its mean.
A pixel of an object is `alpha * colour + (1 - alpha) * grey`, hence its chroma is `alpha` times the colour's,
whatever lies behind. Connected pixels of one colour form a component; its shape is the analytic template that
overlaps its alpha best, among those with the same area and centroid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from rlt2i.tasks.shapes.prompts import ShapesPrompt
from rlt2i.tasks.shapes.render import (
    EXTENT,
    PALETTE_RGB,
    SQUARE_HALF_SIDE,
    TRIANGLE_BASE,
    shape_coverage,
)
from rlt2i.tasks.shapes.vocabulary import CANVAS, COLOURS, RELATIONS, SHAPES

Rule = Literal["exclusive", "geneval"]

FOREGROUND_ALPHA: Final = 0.45
"""Least alpha of a pixel that belongs to an object; alpha is chroma relative to the nearest palette colour's."""

MIN_AREA: Final = 9
"""Least pixels of a component; the smallest object of the world has 24."""

MIN_IOU: Final = 0.70
"""Least soft IoU with the best template. Below .70 house-like blobs pass for squares."""

MIN_MARGIN: Final = 0.03
"""Least lead, in IoU, of the best template over the second."""

MIN_COLOUR_COSINE: Final = 0.92
"""Least cosine between a component's chroma and its palette colour's: about 23 degrees of hue."""

EXTRA_FACTOR: Final = 0.6
"""The exclusive rule multiplies the partial score by this for each extra object."""

_CHUNK: Final = 256

_CHROMA: Final = PALETTE_RGB - PALETTE_RGB.mean(1, keepdim=True)
_STRENGTH: Final = _CHROMA.norm(dim=1)
_DIRECTION: Final = _CHROMA / _STRENGTH[:, None]

# Area and height of the centroid of each shape at radius 1, in the order of SHAPES.
_UNIT_AREA: Final = (math.pi, (2 * SQUARE_HALF_SIDE) ** 2, (1 + TRIANGLE_BASE) * EXTENT)
_UNIT_CENTROID: Final = (0.0, 0.0, TRIANGLE_BASE - (1 + TRIANGLE_BASE) / 3)


@attrs.frozen(kw_only=True)
class Detection:
    """One coloured object.

    Attributes:
        shape: One of `SHAPES`, or None if no template fits.
        colour: One of `COLOURS`, or None if the hue is none of the palette's.
        cx: Centroid, in pixels from the left edge.
        cy: Centroid, in pixels from the top edge.
        area: Antialiased area, in pixels.
        iou: Soft IoU with the best template, in [0, 1].
    """

    shape: str | None
    colour: str | None
    cx: float
    cy: float
    area: float
    iou: float


@attrs.frozen(kw_only=True, eq=False)
class Verdict:
    """What the verifier saw in B images and how well it matches their prompts.

    Attributes:
        strict: [B] float32, 1 where the image is right and 0 where it is not.
        partial: [B] float32 in [0, 1], credit for what is right; 1 wherever strict is 1.
        num_objects: [B] long, coloured objects of any shape, recognised or not.
        detections: Per image, its objects, ordered by colour and then from top to bottom.
        masks: Per image, [N, 32, 32] bool, the pixels of each detection in the same order.
        region: [B, 32, 32] bool, the union of an image's masks: the pixels that the verdict depends on.
    """

    strict: Tensor
    partial: Tensor
    num_objects: Tensor
    detections: tuple[tuple[Detection, ...], ...]
    masks: tuple[Tensor, ...]
    region: Tensor


def verify(images: Tensor, prompts: Sequence[ShapesPrompt], *, rule: Rule = "exclusive") -> Verdict:
    """Judge each image against its prompt.

    Partial credit: an object counts half if its shape is there in the wrong colour; counting gives
    1 - |found - wanted| / wanted; position gives a quarter per object and half for the relation.

    The `exclusive` rule asks for what the prompt names *and no other coloured object*: an extra one,
    recognisable or not, makes strict 0 and multiplies partial by 0.6. The `geneval` rule ignores extras
    outside counting, as GenEval does. It is here as a lesson: a policy trained on it learns to fill the canvas
    with objects, because one of them is bound to be right. Watch `num_objects`.

    Args:
        images: [B, 32, 32, 3] uint8, or [B, 3, 32, 32] floating point in [0, 1] (overshoot is clipped).
        prompts: B prompts.
        rule: "exclusive" or "geneval".

    Returns:
        A verdict of B rows, on the CPU. An image that shows nothing readable is wrong, not an error.

    Raises:
        ValueError: Wrong shape or dtype, unequal numbers of images and prompts, non-finite pixels, or an
            unknown rule.
    """
    if rule not in ("exclusive", "geneval"):
        raise ValueError(f"verify(rule={rule!r}): unknown. Use 'exclusive', or 'geneval' to see reward hacking.")
    images = _as_unit_floats(images)
    if len(images) != len(prompts):
        raise ValueError(f"verify: {len(images)} images but {len(prompts)} prompts. Pass one prompt per image.")

    detections: list[tuple[Detection, ...]] = []
    masks: list[Tensor] = []
    for chunk in images.split(_CHUNK):
        for objects, pixels in _detect(chunk):
            detections.append(objects)
            masks.append(pixels)
    scores = [_score(prompt, objects, rule) for prompt, objects in zip(prompts, detections, strict=True)]
    return Verdict(
        strict=torch.tensor([float(strict) for strict, _ in scores]),
        partial=torch.tensor([float(partial) for _, partial in scores]),
        num_objects=torch.tensor([len(objects) for objects in detections], dtype=torch.long),
        detections=tuple(detections),
        masks=tuple(masks),
        region=torch.stack([pixels.any(0) for pixels in masks])
        if masks
        else torch.zeros(0, CANVAS, CANVAS, dtype=torch.bool),
    )


def regions_on_grid(verdict: Verdict, grid: tuple[int, int]) -> Tensor:
    """How much of each grid cell is covered by judged objects.

    Args:
        verdict: Of B images.
        grid: (h, w) of the credit grid, such as (8, 8) for image tokens or (16, 16) for latents.

    Returns:
        [B, h, w] float32 in [0, 1]; the mean over cells is the mean over pixels if h and w divide 32.
    """
    return F.adaptive_avg_pool2d(verdict.region[:, None].float(), grid)[:, 0]


def _as_unit_floats(images: Tensor) -> Tensor:
    """Check images and bring them to [B, 3, 32, 32] float32 in [0, 1] on the CPU."""
    images = torch.as_tensor(images).detach().cpu()
    if images.dtype == torch.uint8:
        expected, layout = (CANVAS, CANVAS, 3), "[B, 32, 32, 3] uint8"
    elif images.is_floating_point():
        expected, layout = (3, CANVAS, CANVAS), "[B, 3, 32, 32] floating point"
    else:
        raise ValueError(f"verify: images are {images.dtype}. Pass uint8 [B, 32, 32, 3] or floats [B, 3, 32, 32].")
    if images.ndim != 4 or images.shape[1:] != expected:
        raise ValueError(f"verify: images are {list(images.shape)} {images.dtype}; this world needs {layout}.")
    if images.dtype == torch.uint8:
        return images.permute(0, 3, 1, 2).float() / 255
    images = images.float()
    if not images.isfinite().all():
        bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"verify: images {bad[:8]} hold NaN or infinity, which is a failed decode and not a wrong picture. "
            "Mark those rollouts invalid before scoring."
        )
    return images.clamp(0, 1)


def _detect(images: Tensor) -> list[tuple[tuple[Detection, ...], Tensor]]:
    """[B, 3, 32, 32] in [0, 1] -> per image, its detections and their [N, 32, 32] masks."""
    chroma = images - images.mean(1, keepdim=True)
    label = torch.einsum("bkhw,ck->bchw", chroma, _DIRECTION).argmax(1)
    # The length of the chroma, not its projection: a hue far from the whole palette must not be invisible.
    foreground = chroma.norm(dim=1) > FOREGROUND_ALPHA * _STRENGTH[label]
    layers = F.one_hot(label, len(COLOURS)).movedim(-1, 1).bool() & foreground[:, None]
    row, colour, mask = _components(layers)

    # A component owns its pixels and the antialiased rim around them, but never a pixel of another component.
    inside = mask.float()
    rim = F.max_pool2d(inside[:, None], 3, 1, 1)[:, 0].bool() & (mask | ~foreground[row])
    own_alpha = (torch.einsum("kchw,kc->khw", chroma[row], _DIRECTION[colour]) / _STRENGTH[colour, None, None]) * rim
    # The interior of a pale object is the reference of its own alpha, or its fitted area would come out too small.
    interior = F.avg_pool2d(own_alpha[:, None] * inside[:, None], 3, 1, 1).flatten(1).amax(1).clamp(0.5, 1.2)
    own_alpha = (own_alpha / interior[:, None, None]).clamp(0, 1)

    iou, shape, area, centre = _fit_shapes(own_alpha)
    mean_chroma = (chroma[row] * (own_alpha * inside)[:, None]).sum((2, 3))
    cosine = F.cosine_similarity(mean_chroma, _DIRECTION[colour], dim=1)
    detections: list[list[Detection]] = [[] for _ in images]
    columns = zip(
        row.tolist(),
        colour.tolist(),
        cosine.tolist(),
        iou.tolist(),
        shape.tolist(),
        area.tolist(),
        centre.tolist(),
        strict=True,
    )
    for b, c, hue, fit, s, size, (x, y) in columns:
        detections[b].append(
            Detection(
                shape=SHAPES[s] if s >= 0 else None,
                colour=COLOURS[c] if hue >= MIN_COLOUR_COSINE else None,
                cx=x,
                cy=y,
                area=size,
                iou=fit,
            )
        )
    return [(tuple(d), m) for d, m in zip(detections, mask.split([len(d) for d in detections]), strict=True)]


def _components(layers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four-connected components of each layer, by propagating the largest pixel index.

    Args:
        layers: [B, C, 32, 32] bool.

    Returns:
        For each of K components of at least `MIN_AREA` pixels, ordered by image: [K] image, [K] layer,
        and [K, 32, 32] bool mask.
    """
    batch, colours = layers.shape[:2]
    index = torch.arange(1, CANVAS * CANVAS + 1, dtype=torch.float32).view(CANVAS, CANVAS)
    ids = index * layers
    while True:
        before = ids
        for _ in range(4):
            vertical = F.max_pool2d(ids, (3, 1), 1, (1, 0))
            horizontal = F.max_pool2d(ids, (1, 3), 1, (0, 1))
            ids = torch.maximum(vertical, horizontal) * layers
        if torch.equal(ids, before):
            break
    ids = ids.long()
    size = torch.zeros(batch, colours, CANVAS * CANVAS + 1, dtype=torch.long)
    size.scatter_add_(2, ids.flatten(2), torch.ones_like(ids.flatten(2)))
    row, colour, root = (size[:, :, 1:] >= MIN_AREA).nonzero(as_tuple=True)
    return row, colour, ids[row, colour] == root[:, None, None] + 1


def _fit_shapes(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Match components with templates of the same area and centroid.

    Args:
        alpha: [K, 32, 32] in [0, 1], each with some mass.

    Returns:
        [K] best IoU, [K] index of the shape or -1 where none fits, [K] area in pixels, [K, 2] centroid in pixels.
    """
    centres = torch.arange(CANVAS, dtype=torch.float32) + 0.5
    area = alpha.sum((1, 2))
    centroid = torch.stack([(alpha.sum(1) * centres).sum(1), (alpha.sum(2) * centres).sum(1)], 1) / area[:, None]
    ious = []
    for shape, (unit_area, unit_centroid) in enumerate(zip(_UNIT_AREA, _UNIT_CENTROID, strict=True)):
        radius = (area / unit_area).sqrt()
        centre = centroid - torch.stack([torch.zeros_like(radius), unit_centroid * radius], 1)
        template = shape_coverage(torch.full(area.shape, shape), centre, radius)
        ious.append(torch.minimum(template, alpha).sum((1, 2)) / torch.maximum(template, alpha).sum((1, 2)))
    (first, second), order = torch.stack(ious).topk(2, dim=0)
    fits = (first > MIN_IOU) & (first - second > MIN_MARGIN)
    return first, torch.where(fits, order[0], -1), area, centroid


def _score(prompt: ShapesPrompt, detections: Sequence[Detection], rule: Rule) -> tuple[bool, float]:
    """One image's strict and partial score."""
    strict, partial = _score_named(prompt, detections)
    extra = max(0, len(detections) - prompt.count)
    if rule == "exclusive" and extra:
        return False, partial * EXTRA_FACTOR**extra
    return strict, partial


def _score_named(prompt: ShapesPrompt, detections: Sequence[Detection]) -> tuple[bool, float]:
    """Strict and partial score for what the prompt names, whatever else there is."""
    if prompt.category == "counting":
        shape, _ = prompt.objects[0]
        count = sum(d.shape == shape for d in detections)
        return count == prompt.count, max(0.0, 1 - abs(count - prompt.count) / prompt.count)

    if prompt.relation is not None:
        (first, _), (second, _) = prompt.objects
        candidates = [[d for d in detections if d.shape == shape] for shape in (first, second)]
        related = any(_related(a, b, prompt.relation) for a in candidates[0] for b in candidates[1])
        return related, sum(0.25 for c in candidates if c) + 0.5 * related

    credits = [_credit(shape, colour, detections) for shape, colour in prompt.objects]
    return all(c == 1 for c in credits), sum(credits) / len(credits)


def _credit(shape: str, colour: str | None, detections: Sequence[Detection]) -> float:
    """1 for the shape in the right colour, a half for the shape in a wrong one."""
    colours = [d.colour for d in detections if d.shape == shape]
    if not colours:
        return 0.0
    return 1.0 if colour is None or colour in colours else 0.5


def _related(first: Detection, second: Detection, relation: str) -> bool:
    """Whether `first` lies in the relation's direction from `second`: over 2 pixels, and not mostly sideways."""
    ux, uy = RELATIONS[relation]
    dx, dy = first.cx - second.cx, first.cy - second.cy
    towards, sideways = dx * ux + dy * uy, abs(dx * uy) + abs(dy * ux)
    return towards > 2 and towards >= 0.9 * sideways
