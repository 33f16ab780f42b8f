"""The words of the shapes world, and what each of them means on the canvas."""

from __future__ import annotations

from typing import Final

CANVAS: Final = 32
"""Side of the square canvas, in pixels."""

SHAPES: Final = ("circle", "square", "triangle")
"""Order matters: a shape's index is its code in tensors."""

PLURALS: Final = {"circle": "circles", "square": "squares", "triangle": "triangles"}

PALETTE: Final = {
    "red": (220, 40, 40),
    "green": (30, 170, 55),
    "blue": (40, 70, 215),
    "yellow": (240, 210, 40),
}
"""sRGB bytes. Order matters: a colour's index is its code in tensors."""

COLOURS: Final = tuple(PALETTE)

NUMBERS: Final = {2: "two", 3: "three"}

RELATIONS: Final = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Unit vector from the second object of the prompt to the first; x grows rightwards, y downwards."""

CATEGORIES: Final = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's six categories, under GenEval's names."""

FUNCTION_WORDS: Final = ("a", "and", "of")
"""Words that carry no content of their own."""

WORDS: Final = tuple(
    sorted(
        {
            *FUNCTION_WORDS,
            *SHAPES,
            *PLURALS.values(),
            *COLOURS,
            *NUMBERS.values(),
            *(word for relation in RELATIONS for word in relation.split()),
        }
    )
)
"""Every word a prompt can contain; the tokenizer gives each of them exactly one token."""
