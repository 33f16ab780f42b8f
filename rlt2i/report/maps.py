"""Allocation maps over images: where, and at which denoising step, credit is spent.

A map [h, w] holds weights with mean one: 1 is uniform credit, 2 is twice that. It is drawn cell by cell,
without smoothing, over a grey version of the image, so that the only colour in the picture is the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from rlt2i.report.charts import QUIET, axes, figure, text
from rlt2i.report.pictures import check_images, colour_map, enlarge, paste, rendered, thumbnail, tiled

_SIDE, _GAP, _MARGIN, _NAME_WIDTH = 112, 6, 18, 92


def scale_top(maps: Tensor) -> float:
    """The weight at the top of the colour scale: the largest but one per cent, at least 2.

    The bound of 2 makes an almost uniform map look almost uniform; leaving out one per cent keeps a single
    attention sink from turning everything else dark.
    """
    values = maps.detach().float().cpu().flatten()
    values = values[:: -(-len(values) // 1_000_000)]  # torch.quantile refuses more than 16 million
    return max(2.0, float(torch.quantile(values, 0.99)))


def overlay(image: Tensor, weights: Tensor, *, top: float, alpha: float = 0.82) -> Tensor:
    """Lay one map over one image.

    Args:
        image: [3, H, W] uint8; its colours are dropped.
        weights: [h, w] >= 0; any grid, stretched over the image.
        top: the weight that gets the last colour.
        alpha: share of the map's colour; the rest is the grey image.

    Returns:
        [3, H, W] uint8.

    Raises:
        ValueError: for weights that are no [h, w].
    """
    if weights.ndim != 2:
        raise ValueError(f"overlay.weights: got shape {list(weights.shape)}, expected [h, w].")
    colours = colour_map(weights.detach().float().cpu() / top)
    colours = transform.resize(colours, list(image.shape[-2:]), InterpolationMode.NEAREST)
    grey = transform.rgb_to_grayscale(image.cpu(), num_output_channels=3)
    return (alpha * colours + (1 - alpha) * grey).round().to(torch.uint8)


def draw_maps(
    images: Tensor,
    maps: Tensor,
    sigmas: Sequence[float] | Tensor,
    title: str,
    *,
    top: float | None = None,
    max_columns: int = 12,
) -> Image.Image:
    """A strip over denoising steps: the clean predictions if given, and the maps over them.

    Args:
        images: [T, 3, H, W] uint8 clean predictions per step, or [1, 3, H, W], the finished image.
        maps: [T, h, w] weights, mean one; T = 1 when credit does not change over the steps.
        sigmas: T or T+1 noise levels.
        title: the prompt.
        top: upper end of the colour scale, to compare strips; by default `scale_top(maps)`.
        max_columns: more steps than this are thinned evenly, the first and the last included.

    Returns:
        An RGB picture.
    """
    check_images("draw_maps.images", images)
    levels = [float(sigma) for sigma in sigmas]
    steps = _num_steps(images, maps, len(levels))
    top = scale_top(maps) if top is None else top
    shown = spread(steps, max_columns)
    predictions = len(images) > 1
    tiles = enlarge(images.cpu(), _SIDE)
    upper = [tiles[step] for step in shown] if predictions else []
    lower = [overlay(tiles[step if predictions else 0], maps[min(step, len(maps) - 1)], top=top) for step in shown]
    strip = tiled([*upper, *lower], len(shown), _GAP)
    tall, wide = tiles.shape[-2] + _GAP, tiles.shape[-1] + _GAP
    left, head = _MARGIN + _NAME_WIDTH + (0 if predictions else wide + _GAP), _MARGIN + 62
    with figure(max(left + strip.shape[-1] + _MARGIN, 560), head + strip.shape[-2] + 62) as canvas:
        text(canvas, _MARGIN, _MARGIN + 14, title, fontsize=17)
        names = ("clean\nprediction", "weight") if predictions else ("weight",)
        for row, name in enumerate(names):
            text(canvas, _MARGIN, head + (row + 0.5) * tall, name, color=QUIET, va="center")
        if not predictions:
            text(canvas, left - wide, head, "image", color=QUIET)
            paste(canvas, tiles[0], left - wide, head + _GAP)
        for column, step in enumerate(shown):
            x = left + _GAP + column * wide
            text(canvas, x, head - 18, f"step {step}")
            text(canvas, x, head, f"σ {levels[step]:.2f}", color=QUIET)
        paste(canvas, strip, left, head)
        draw_scale(canvas, _MARGIN + _NAME_WIDTH + _GAP, head + strip.shape[-2] + 14, top, largest=float(maps.max()))
        return rendered(canvas)


def _num_steps(images: Tensor, maps: Tensor, num_levels: int) -> int:
    """T, from three inputs that may each have a single step."""
    if maps.ndim != 3:
        raise ValueError(f"draw_maps.maps: got shape {list(maps.shape)}, expected [T, h, w].")
    steps = max(len(images), len(maps))
    if min(len(images), len(maps)) < 1 or any(n not in (1, steps) for n in (len(images), len(maps))):
        raise ValueError(f"draw_maps: {len(images)} images for {len(maps)} maps; give one, or as many as maps.")
    if num_levels not in (steps, steps + 1):
        if steps == 1:  # credit that no step resolves, over the finished image
            return 1
        raise ValueError(f"draw_maps: {num_levels} sigmas for {steps} steps; expected {steps} or {steps + 1}.")
    return steps


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` indices, evenly, first and last included."""
    if count <= limit:
        return list(range(count))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)}) if limit > 1 else [count - 1]


def scale_end(top: float, largest: float) -> str:
    """What stands at the upper end of the colour scale."""
    return f"{top:.1f}" if largest <= top * 1.005 else f"{top:.1f} and more (up to {largest:.1f})"


def draw_scale(canvas: Figure, x: float, y: float, top: float, *, largest: float, width: int = 260) -> None:
    """The colour scale: 0, uniform, top."""
    canvas_width, canvas_height = canvas.get_size_inches() * 72
    bar = axes(canvas, x, y, canvas_width - x - width, canvas_height - y - 12)
    bar.imshow(torch.linspace(0, top, width)[None].numpy(), cmap="viridis", aspect="auto", extent=(0, top, 0, 1))
    bar.axvline(1, color="black", linewidth=2)
    bar.set_xticks([0, 1], ["0", "1 = uniform"])
    bar.set_yticks([])
    text(canvas, x + width + 8, y + 11, scale_end(top, largest), color=QUIET)


def small_pair(image: Tensor, weights: Tensor, *, top: float, side: int = 128) -> tuple[Tensor, Tensor]:
    """An image [3, H, W] and its overlay, small enough to put dozens of them into a page.

    The picture is enlarged only as far as the map's cells need it: a cell takes at least one pixel.
    """
    picture = thumbnail(image.cpu(), side)
    while min(picture.shape[-2:]) < max(weights.shape) and max(picture.shape[-2:]) * 2 <= 4 * side:
        picture = picture.repeat_interleave(2, -2).repeat_interleave(2, -1)
    return picture, overlay(picture, weights, top=top)
