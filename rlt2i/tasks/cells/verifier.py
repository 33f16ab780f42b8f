"""Judges the cells that a prompt names, each alone, with the exact verifier of the shapes world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
import torch
from torch import Tensor

from rlt2i.tasks.cells.prompts import CellsPrompt, Content
from rlt2i.tasks.cells.vocabulary import CELL_PIXELS, side
from rlt2i.tasks.shapes import verifier as shapes
from rlt2i.tasks.shapes.prompts import ShapesPrompt
from rlt2i.tasks.shapes.vocabulary import CANVAS

_GREY: Final = 0.85
"""Around a cell that is judged; without chroma, so the verifier does not see it."""


@attrs.frozen(kw_only=True, eq=False)
class Verdict:
    """How well B images match their prompts, by what lies in the named cells.

    Attributes:
        strict: [B] float32, 1 where every named cell shows what was asked for and nothing else.
        partial: [B] float32 in [0, 1], mean over the named cells: a half for the right shape in a wrong colour, times
            0.6 for every other object in the cell.
        cells: Per image, the partial score of each cell that its prompt names, in order.
        region: [B, S, S] bool, the named cells: a function of the prompt alone, and all that the verdict depends on.
    """

    strict: Tensor
    partial: Tensor
    cells: tuple[Tensor, ...]
    region: Tensor


def box(grid: int, cell: int) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) of a cell, in pixels, ends excluded."""
    size = CELL_PIXELS[grid]
    x, y = cell % grid * size, cell // grid * size
    return x, y, x + size, y + size


def verify(images: Tensor, prompts: Sequence[CellsPrompt]) -> Verdict:
    """Judge each image against its prompt.

    A cell is cut out and judged as an image of its own. Of an object that crosses a border, each cell has its part.

    Args:
        images: [B, 3, S, S] uint8, or floating point in [0, 1].
        prompts: B prompts, of the grids whose canvas has S pixels a side.

    Returns:
        A verdict of B rows, on the CPU.

    Raises:
        ValueError: unequal numbers of images and prompts, another size, non-finite pixels.
    """
    if len(images) != len(prompts):
        raise ValueError(f"verify: {len(images)} images but {len(prompts)} prompts. Pass one prompt per image.")
    for prompt in prompts:
        if images.ndim != 4 or images.shape[1:] != (3, side(prompt.grid), side(prompt.grid)):
            raise ValueError(
                f"verify: images are {list(images.shape)}; {prompt.grid} x {prompt.grid} cells need "
                f"[B, 3, {side(prompt.grid)}, {side(prompt.grid)}]. Set train.image_size to {side(prompt.grid)}."
            )
    pixels = images.cpu().float() / 255 if images.dtype == torch.uint8 else images.cpu().float()
    region = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
    crops, requested = [], []
    for image, mask, prompt in zip(pixels, region, prompts, strict=True):
        for content in prompt.named:
            x1, y1, x2, y2 = box(prompt.grid, content.cell)
            mask[y1:y2, x1:x2] = True
            crops.append(_framed(image[:, y1:y2, x1:x2]))
            requested.append(_alone(content))
    verdict = shapes.verify(torch.stack(crops), requested)
    counts = [len(prompt.named) for prompt in prompts]
    return Verdict(
        strict=torch.stack([cells.amin() for cells in verdict.strict.split(counts)]),
        partial=torch.stack([cells.mean() for cells in verdict.partial.split(counts)]),
        cells=verdict.partial.split(counts),
        region=region,
    )


def _framed(cell: Tensor) -> Tensor:
    """[3, s, s] a cell -> [3, 32, 32] the same in the middle of a grey canvas."""
    start = (CANVAS - cell.shape[-1]) // 2
    canvas = torch.full((3, CANVAS, CANVAS), _GREY)
    canvas[:, start : start + cell.shape[-2], start : start + cell.shape[-1]] = cell
    return canvas


def _alone(content: Content) -> ShapesPrompt:
    return ShapesPrompt(
        text=f"a {content.colour} {content.shape}",
        category="colors",
        objects=((content.shape, content.colour),),
        count=1,
    )
