"""Text of others, such as prompts, on its way to a reader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_BIDIRECTIONAL = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SPELT = {code: f"\\u{code:04x}" for code in _BIDIRECTIONAL}


def visible(value: T) -> T:
    """A string with its bidirectional controls spelt out, so that nothing is shown in another order than it stands.

    Anything but a string is returned as it is; markup stays markup.
    """
    return type(value)(value.translate(_SPELT)) if isinstance(value, str) else value


def cell(value: T) -> T | str:
    """A cell of a CSV file: what a spreadsheet would take for a formula is marked as text; numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@")) else value


def marked(text: str, phrases: Sequence[str]) -> list[tuple[str, bool]]:
    """Pieces of the text, and whether each is one of the phrases, wherever they stand as written."""
    lower = text.lower()
    covered = [False] * len(text)
    for phrase in {p.lower() for p in phrases if p.strip()}:
        start = lower.find(phrase)
        while start >= 0:
            covered[start : start + len(phrase)] = [True] * len(phrase)
            start = lower.find(phrase, start + len(phrase))
    pieces: list[tuple[str, bool]] = []
    begin = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or covered[end] != covered[begin]:
            pieces.append((text[begin:end], covered[begin]))
            begin = end
    return pieces
