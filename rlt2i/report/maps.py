"""Allocation maps over images: where, and at which denoising step, credit is spent.

A map [h, w] holds weights with mean one: 1 is uniform credit, 2 is twice that. It is drawn cell by cell,
without smoothing, over a grey version of the image, so that the only colour in the picture is the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from rlt2i.report.palette import colour_map
from rlt2i.report.pixels import check_images, drawable, enlarge, font, thumbnail, to_array

_INK, _QUIET, _PAPER = "#1d1d1f", "#6a6a70", "#ffffff"
_SIDE, _GAP, _MARGIN, _NAME_WIDTH = 112, 6, 18, 92
_LUMINANCE = np.array([0.299, 0.587, 0.114])


def scale_top(maps: Tensor) -> float:
    """The weight at the top of the colour scale: the largest but one per cent, at least 2.

    The bound of 2 makes an almost uniform map look almost uniform; leaving out one per cent keeps a single
    attention sink from turning everything else dark.
    """
    return max(2.0, float(torch.quantile(_sample(maps.detach().float().cpu().flatten()), 0.99)))


def _sample(values: Tensor, limit: int = 1_000_000) -> Tensor:
    """torch.quantile refuses more than 16 million values."""
    return values[:: -(-len(values) // limit)]


def overlay(image: Image.Image, weights: Tensor, *, top: float, alpha: float = 0.82) -> Image.Image:
    """Lay one map over one image.

    Args:
        image: any size; its colours are dropped.
        weights: [h, w] >= 0; any grid, stretched over the image.
        top: the weight that gets the last colour.
        alpha: share of the map's colour; the rest is the grey image.
    """
    if weights.ndim != 2:
        raise ValueError(f"overlay.weights: got shape {list(weights.shape)}, expected [h, w].")
    grid = weights.detach().float().cpu().numpy()
    colours = colour_map(grid / top)
    height, width = image.height, image.width
    rows = np.arange(height) * grid.shape[0] // height
    columns = np.arange(width) * grid.shape[1] // width
    colour = colours[rows][:, columns].astype(np.float64)
    grey = (np.asarray(image.convert("RGB"), dtype=np.float64) @ _LUMINANCE)[..., None]
    return Image.fromarray(np.rint(alpha * colour + (1 - alpha) * grey).astype(np.uint8))


def effective_support(maps: Tensor) -> Tensor:
    """The share of an image over which a map spreads: (mean w)^2 / mean w^2; 1/n is one cell of n.

    Args:
        maps: [..., h, w].

    Returns:
        [...] float32; nan where a map is all zero.
    """
    maps = maps.float()
    return maps.mean(dim=(-2, -1)).square() / maps.square().mean(dim=(-2, -1))


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
    cell = enlarge(Image.fromarray(to_array(images[0])), _SIDE).size
    title_font, text_font = font(17), font(12)
    head = _MARGIN + 32
    rows = 2 if predictions else 1
    grid_width = len(shown) * cell[0] + (len(shown) - 1) * _GAP
    width = 2 * _MARGIN + _NAME_WIDTH + grid_width + (0 if predictions else cell[0] + 2 * _GAP)
    canvas = Image.new("RGB", (max(width, 560), head + 36 + rows * (cell[1] + _GAP) + 52), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN - 4), drawable(title), font=title_font, fill=_INK)
    left = _MARGIN + _NAME_WIDTH
    y = head + 36
    if predictions:
        draw.text((_MARGIN, y + cell[1] // 2 - 15), "clean\nprediction", font=text_font, fill=_QUIET, spacing=3)
        draw.text((_MARGIN, y + cell[1] * 3 // 2 + _GAP - 7), "weight", font=text_font, fill=_QUIET)
    else:
        draw.text((_MARGIN, y + cell[1] // 2 - 7), "weight", font=text_font, fill=_QUIET)
        draw.text((left, head + 18), "image", font=text_font, fill=_QUIET)
        canvas.paste(enlarge(Image.fromarray(to_array(images[0])), _SIDE), (left, y))
        left += cell[0] + 2 * _GAP
    for column, step in enumerate(shown):
        x = left + column * (cell[0] + _GAP)
        picture = Image.fromarray(to_array(images[step if predictions else 0]))
        large = enlarge(picture, _SIDE)
        draw.text((x, head), drawable(f"step {step}"), font=text_font, fill=_INK)
        draw.text((x, head + 18), drawable(f"σ {levels[step]:.2f}"), font=text_font, fill=_QUIET)
        if predictions:
            canvas.paste(large, (x, y))
        canvas.paste(overlay(large, maps[min(step, len(maps) - 1)], top=top), (x, y + (rows - 1) * (cell[1] + _GAP)))
    _draw_scale(canvas, _MARGIN + _NAME_WIDTH, canvas.height - 46, top, float(maps.max()))
    return canvas


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


def _draw_scale(canvas: Image.Image, x: int, y: int, top: float, largest: float) -> None:
    """The colour scale: 0, uniform, top."""
    draw = ImageDraw.Draw(canvas)
    width, height, face = 260, 12, font(12)
    ramp: NDArray[np.uint8] = colour_map(np.linspace(0, 1, width)[None].repeat(height, axis=0))
    canvas.paste(Image.fromarray(ramp), (x, y))
    uniform = x + round(width / top)
    draw.line([(uniform, y - 3), (uniform, y + height + 2)], fill=_INK, width=2)
    draw.text((x, y + 16), "0", font=face, fill=_QUIET)
    draw.text((uniform, y + 16), "1 = uniform", font=face, fill=_INK, anchor="ma")
    end = f"{top:.1f}" if largest <= top * 1.005 else f"{top:.1f} and more (up to {largest:.1f})"
    draw.text((x + width + 8, y - 2), drawable(end), font=face, fill=_QUIET)


def small_pair(image: Tensor, weights: Tensor, *, top: float, side: int = 128) -> tuple[Image.Image, Image.Image]:
    """An image [3, H, W] and its overlay, small enough to put dozens of them into a page.

    The picture is enlarged only as far as the map's cells need it: a cell takes at least one pixel.
    """
    picture = thumbnail(Image.fromarray(to_array(image)), side)
    while min(picture.size) < max(weights.shape) and max(picture.size) * 2 <= 4 * side:
        picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
    return picture, overlay(picture, weights, top=top)
