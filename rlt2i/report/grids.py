"""Labelled grids of images: what the model paints, what was asked, what it scored."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

from rlt2i.report.charts import QUIET, figure, text
from rlt2i.report.pictures import FAILURE, NEUTRAL, SUCCESS, check_images, enlarge, paste, rendered, rgb, tiled, wrapped

_BORDER, _GAP, _MARGIN, _LINE = 3, 14, 18, 16
_SIGNS = {True: ("✓ ", SUCCESS), False: ("✗ ", FAILURE), None: ("", NEUTRAL)}
"""A sign beside the colour, for readers who do not see red and green apart."""


def image_grid(
    images: Tensor,
    *,
    captions: Sequence[str] = (),
    scores: Sequence[float] = (),
    passed: Sequence[bool | None] = (),
    columns: int = 8,
    side: int = 128,
    title: str = "",
) -> Image.Image:
    """Lay out images row by row, each with its prompt and its reward below.

    Args:
        images: [N, 3, H, W] uint8. Smaller than `side`: enlarged by a whole factor, pixel by pixel.
        captions: N prompts, or none.
        scores: N rewards, or none.
        passed: N verdicts: a green border and a tick, a red border and a cross, or grey for None; or none.
        columns: images per row.
        side: about how many pixels an image takes.
        title: a line above the grid.

    Returns:
        An RGB picture.

    Raises:
        ValueError: without images, or with another number of captions or rewards.
    """
    check_images("image_grid.images", images)
    for name, values in (("captions", captions), ("scores", scores), ("passed", passed)):
        if values and len(values) != len(images):
            raise ValueError(f"image_grid: {len(values)} {name} for {len(images)} images.")
    if not len(images):
        raise ValueError("image_grid: no image to show.")
    tiles = enlarge(images.cpu(), side)
    width = max(tiles.shape[-1], 64) + 2 * _BORDER
    lines = [wrapped(caption, width, 3) for caption in captions]
    below = _LINE * max((line.count("\n") + 1 for line in lines), default=0) + (18 if scores or passed else 0)
    verdicts = passed or [None] * len(tiles)
    framed = [transform.pad(t, [_BORDER], fill=rgb(_SIGNS[v][1])) for t, v in zip(tiles, verdicts, strict=True)]
    room = [0, 0, width - framed[0].shape[-1], below]
    columns = max(1, min(columns, len(tiles)))
    grid = tiled([transform.pad(t, room, fill=255) for t in framed], columns, _GAP)
    top = _MARGIN - _GAP + (34 if title else 0)
    margin = _MARGIN - _GAP
    with figure(grid.shape[-1] + 2 * margin, grid.shape[-2] + top + margin) as canvas:
        text(canvas, _MARGIN, _MARGIN + 14, title, fontsize=18)
        paste(canvas, grid, margin, top)
        for i, tile in enumerate(framed):
            x = _MARGIN + (i % columns) * (width + _GAP)
            y = top + _GAP + (i // columns) * (tile.shape[-2] + below + _GAP) + tile.shape[-2] + 4
            sign, colour = _SIGNS[verdicts[i]]
            if scores or passed:
                text(canvas, x, y, sign, va="top", color=colour, fontweight="bold")
                text(canvas, x + (17 if sign else 0), y, f"{scores[i]:.2f}" if scores else "", va="top", color=QUIET)
            if captions:
                text(canvas, x, y + (18 if scores or passed else 0), lines[i], va="top", linespacing=1.15)
        return rendered(canvas)
