"""Prompts of the cells world: which cell shows what, for one cell or for two."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

import attrs

from rlt2i.tasks.cells.vocabulary import GRIDS, cell_name
from rlt2i.tasks.shapes.vocabulary import COLOURS, SHAPES


@attrs.frozen(kw_only=True)
class Content:
    """One cell and the object that it is to show.

    Attributes:
        cell: Number of the cell, row by row.
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
    """

    cell: int = attrs.field(validator=attrs.validators.ge(0))
    shape: str = attrs.field(validator=attrs.validators.in_(SHAPES))
    colour: str = attrs.field(validator=attrs.validators.in_(COLOURS))


@attrs.frozen(kw_only=True)
class CellsPrompt:
    """What one or two cells of a grid are to show; the others are free, and nobody judges them.

    Attributes:
        grid: Cells along a side, 2 or 3.
        named: The cells that the prompt names, in reading order.
    """

    grid: int = attrs.field(validator=attrs.validators.in_(GRIDS))
    named: tuple[Content, ...] = attrs.field()

    @named.validator
    def _check_named(self, _: Any, value: tuple[Content, ...]) -> None:
        cells = [content.cell for content in value]
        if not 1 <= len(cells) <= 2 or cells != sorted(set(cells)) or cells[-1] >= self.grid**2:
            raise ValueError(
                f"CellsPrompt(grid={self.grid}): names the cells {cells}. Name one or two different ones, in "
                f"reading order, from 0 to {self.grid**2 - 1}."
            )

    @property
    def text(self) -> str:
        """For example "a red circle above left", or two of these joined by "and"."""
        return " and ".join(f"a {phrase}" for phrase in self.core)

    @property
    def core(self) -> tuple[str, ...]:
        """One phrase for each named cell: what it shows and where it is."""
        return tuple(f"{c.colour} {c.shape} {cell_name(self.grid, c.cell)}" for c in self.named)

    @property
    def category(self) -> str:
        """The cells it names, for tables."""
        return " + ".join(cell_name(self.grid, content.cell) for content in self.named)

    @property
    def held_out(self) -> bool:
        """Whether it is kept for evaluation.

        Cell, shape and colour have numbers; held out is every prompt whose numbers add up to a multiple of four. So
        one colour in four is held out for each cell and shape, and each shape in each colour for one cell in four.
        """
        numbers = [c.cell + SHAPES.index(c.shape) + COLOURS.index(c.colour) for c in self.named]
        return sum(numbers) % len(COLOURS) == 0

    def metadata(self) -> dict[str, Any]:
        """A JSON-able description, from which `from_metadata` rebuilds this prompt."""
        return {"grid": self.grid, "cells": [[c.cell, c.shape, c.colour] for c in self.named]}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> CellsPrompt:
        """Rebuild a prompt from its `metadata()`, also after a round trip through JSON.

        Raises:
            ValueError: A key is missing, or the values describe nothing in this world.
        """
        missing = [key for key in ("grid", "cells") if key not in metadata]
        if missing:
            raise ValueError(
                f"CellsPrompt.from_metadata: {dict(metadata)!r} lacks {', '.join(missing)}. "
                "Pass what CellsPrompt.metadata() returned."
            )
        named = (Content(cell=cell, shape=shape, colour=colour) for cell, shape, colour in metadata["cells"])
        return cls(grid=metadata["grid"], named=tuple(named))


@cache
def all_prompts(grid: int, named: int) -> tuple[CellsPrompt, ...]:
    """Every prompt that names so many cells, by cell, then shape, then colour.

    One cell: 48 prompts on the grid of 2 x 2, 108 on that of 3 x 3. Two cells: 864 and 5,184.
    """
    objects = list(itertools.product(SHAPES, COLOURS))
    return tuple(
        CellsPrompt(
            grid=grid, named=tuple(Content(cell=c, shape=s, colour=k) for c, (s, k) in zip(cells, shown, strict=True))
        )
        for cells in itertools.combinations(range(grid**2), named)
        for shown in itertools.product(objects, repeat=named)
    )


@cache
def split_prompts(grid: int, named: int) -> tuple[dict[str, list[CellsPrompt]], dict[str, list[CellsPrompt]]]:
    """The fixed (train, held-out) split for RL, each by category.

    RL never trains on a held-out prompt. Pretraining sees all of them: the split is about RL alone.
    """
    train: dict[str, list[CellsPrompt]] = {}
    held_out: dict[str, list[CellsPrompt]] = {}
    for prompt in all_prompts(grid, named):
        (held_out if prompt.held_out else train).setdefault(prompt.category, []).append(prompt)
    return train, held_out


def near_misses(prompt: CellsPrompt) -> tuple[CellsPrompt, ...]:
    """The prompts that differ from this one in exactly one shape or colour, at the same cells."""
    misses = []
    for i, content in enumerate(prompt.named):
        others = [attrs.evolve(content, shape=s) for s in SHAPES if s != content.shape]
        others += [attrs.evolve(content, colour=c) for c in COLOURS if c != content.colour]
        misses += [attrs.evolve(prompt, named=(*prompt.named[:i], o, *prompt.named[i + 1 :])) for o in others]
    return tuple(misses)
