"""Prompts with the phrases that the user cares about."""

from __future__ import annotations

from collections.abc import Sequence


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
