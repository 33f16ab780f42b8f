"""Labelled grids of images: what the model paints, what was asked, what it scored."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from rlt2i.report.palette import FAILURE, NEUTRAL, SUCCESS
from rlt2i.report.pixels import check_images, drawable, enlarge, font, to_array, wrap

_INK, _QUIET, _PAPER = "#1d1d1f", "#6a6a70", "#ffffff"
_BORDER, _GAP, _MARGIN = 3, 14, 18


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
    """
    check_images("image_grid.images", images)
    for name, values in (("captions", captions), ("scores", scores), ("passed", passed)):
        if values and len(values) != len(images):
            raise ValueError(f"image_grid: {len(values)} {name} for {len(images)} images.")
    if not len(images):
        raise ValueError("image_grid: no image to show.")
    columns = max(1, min(columns, len(images)))
    tiles = [enlarge(Image.fromarray(to_array(image)), side) for image in images]
    text_font, score_font, title_font = font(12), font(12), font(18)
    cell_width = max(tiles[0].width, 64) + 2 * _BORDER
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    wrapped = [wrap(probe, text, text_font, cell_width, 3) for text in captions]
    text_height = 16 * max((len(lines) for lines in wrapped), default=0) + (18 if scores or passed else 0)
    cell_height = tiles[0].height + 2 * _BORDER + (text_height + 4 if text_height else 0)
    rows = -(-len(tiles) // columns)
    top = _MARGIN + (34 if title else 0)
    canvas = Image.new(
        "RGB",
        (
            2 * _MARGIN + columns * cell_width + (columns - 1) * _GAP,
            top + rows * cell_height + (rows - 1) * _GAP + _MARGIN,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((_MARGIN, _MARGIN - 4), drawable(title), font=title_font, fill=_INK)
    for i, tile in enumerate(tiles):
        x = _MARGIN + (i % columns) * (cell_width + _GAP)
        y = top + (i // columns) * (cell_height + _GAP)
        verdict = passed[i] if passed else None
        colour = {True: SUCCESS, False: FAILURE, None: NEUTRAL}[verdict]
        draw.rectangle((x, y, x + tile.width + 2 * _BORDER - 1, y + tile.height + 2 * _BORDER - 1), fill=colour)
        canvas.paste(tile, (x + _BORDER, y + _BORDER))
        y += tile.height + 2 * _BORDER + 4
        if scores or passed:
            _draw_sign(draw, x + 1, y + 2, verdict, colour)
            if scores:
                offset = 0 if verdict is None else 17
                draw.text((x + offset, y), f"{scores[i]:.2f}", font=score_font, fill=_QUIET)
            y += 18
        for line in wrapped[i] if captions else ():
            draw.text((x, y), line, font=text_font, fill=_INK)
            y += 16
    return canvas


def _draw_sign(draw: ImageDraw.ImageDraw, x: int, y: int, verdict: bool | None, colour: str) -> None:
    """A tick or a cross beside the colour, for readers who do not see red and green apart."""
    if verdict is True:
        draw.line([(x, y + 6), (x + 4, y + 10), (x + 11, y + 1)], fill=colour, width=2, joint="curve")
    elif verdict is False:
        draw.line([(x + 1, y + 1), (x + 10, y + 10)], fill=colour, width=2)
        draw.line([(x + 1, y + 10), (x + 10, y + 1)], fill=colour, width=2)
