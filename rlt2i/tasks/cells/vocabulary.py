"""The words of the cells world: what its cells are called on either grid, and how large they are."""

from __future__ import annotations

from typing import Final

from rlt2i.tasks.shapes.vocabulary import COLOURS, SHAPES

ROWS: Final = {2: ("above", "below"), 3: ("top", "middle", "bottom")}
"""Cells along a side -> what the rows are called, from top to bottom."""

COLUMNS: Final = {2: ("left", "right"), 3: ("left", "centre", "right")}
"""Cells along a side -> what the columns are called, from left to right."""

GRIDS: Final = tuple(ROWS)

CELL_PIXELS: Final = {2: 16, 3: 12}
"""Side of a cell: whole image tokens of 4 pixels on either grid."""

MAX_RADIUS: Final = {2: 5.0, 3: 4.4}
"""Largest radius of an object, in pixels, that leaves it room to move in its cell."""

CANVAS: Final = max(grid * CELL_PIXELS[grid] for grid in GRIDS)
"""Side of the largest canvas, in pixels."""

FUNCTION_WORDS: Final = ("a", "and")

WORDS: Final = tuple(
    sorted(
        {*FUNCTION_WORDS, *SHAPES, *COLOURS, *(word for names in (ROWS, COLUMNS) for g in GRIDS for word in names[g])}
    )
)
"""Every word a prompt can contain; the tokenizer gives each of them exactly one token."""


def side(grid: int) -> int:
    """Side of a grid's canvas, in pixels."""
    return grid * CELL_PIXELS[grid]


def cell_name(grid: int, cell: int) -> str:
    """What a cell is called; cells are numbered row by row."""
    return f"{ROWS[grid][cell // grid]} {COLUMNS[grid][cell % grid]}"
