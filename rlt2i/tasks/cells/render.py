"""Draws scenes of the cells world: every cell shows one object, at a random place within it."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from rlt2i.tasks.cells.prompts import CellsPrompt
from rlt2i.tasks.cells.vocabulary import CELL_PIXELS, MAX_RADIUS, side
from rlt2i.tasks.shapes.render import EXTENT, MIN_RADIUS, background, paint, shape_coverage
from rlt2i.tasks.shapes.vocabulary import COLOURS, SHAPES


@attrs.frozen(kw_only=True, eq=False)
class Scenes:
    """The geometry of B images of one grid with N cells, in pixels; y grows downwards.

    Attributes:
        grid: Cells along a side; N = grid².
        shape: [B, N] long index into `SHAPES`.
        colour: [B, N] long index into `COLOURS`.
        centre: [B, N, 2] x and y of each object.
        radius: [B, N] of each object.
    """

    grid: int
    shape: Tensor
    colour: Tensor
    centre: Tensor
    radius: Tensor


def sample_scenes(prompts: Sequence[CellsPrompt], generator: torch.Generator) -> Scenes:
    """Draw one random scene for each prompt: named cells show what was asked for, the others anything.

    Args:
        prompts: B prompts of one grid.
        generator: A CPU generator; the result is a function of its state.

    Returns:
        Geometry of B images.

    Raises:
        ValueError: prompts of several grids: their canvases differ.
    """
    grids = {prompt.grid for prompt in prompts}
    if len(grids) != 1:
        raise ValueError(f"sample_scenes: prompts of the grids {sorted(grids)}. Draw the scenes of each grid apart.")
    grid = grids.pop()
    size, cells = CELL_PIXELS[grid], torch.arange(grid**2)
    shape = torch.randint(len(SHAPES), (len(prompts), grid**2), generator=generator)
    colour = torch.randint(len(COLOURS), (len(prompts), grid**2), generator=generator)
    for i, prompt in enumerate(prompts):
        for content in prompt.named:
            shape[i, content.cell] = SHAPES.index(content.shape)
            colour[i, content.cell] = COLOURS.index(content.colour)
    radius = MIN_RADIUS + (MAX_RADIUS[grid] - MIN_RADIUS) * torch.rand(shape.shape, generator=generator)
    margin = (radius * EXTENT + 1)[..., None]
    within = margin + (size - 2 * margin) * torch.rand((*shape.shape, 2), generator=generator)
    corner = torch.stack([cells % grid, cells // grid], dim=-1) * size
    return Scenes(grid=grid, shape=shape, colour=colour, centre=corner + within, radius=radius)


def render(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Draw scenes: a grey texture, then the objects.

    Args:
        scenes: B scenes.
        generator: A CPU generator, for texture, grey level and colour jitter.

    Returns:
        [B, 3, S, S] float32 RGB in [0, 1], S = 32 for 2 x 2 cells and 36 for 3 x 3.
    """
    pixels = side(scenes.grid)
    coverage = shape_coverage(scenes.shape, scenes.centre, scenes.radius, side=pixels)
    return paint(background(len(scenes.shape), pixels, generator), coverage, scenes.colour, generator)
