"""What votes over pairs say about a few images of one prompt: what is left to ask, and a score for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import attrs

Choice = Literal["left", "right", "tie", "skip"]
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "skip")
Verdict = Callable[[str, str], Choice | None]
"""(left, right) -> what was chosen of these two, or None where nobody voted on them."""


@attrs.frozen(kw_only=True)
class Standing:
    """Where an image stands among the others of its prompt.

    Attributes:
        won, lost, tied: against how many others, by a vote or by what follows from votes.
    """

    won: int
    lost: int
    tied: int

    @property
    def score(self) -> float | None:
        """(won + tied / 2) / compared, in [0, 1]; None where the image was compared with none."""
        compared = self.won + self.lost + self.tied
        return (self.won + self.tied / 2) / compared if compared else None


def open_pairs(images: Sequence[str], verdict: Verdict) -> list[tuple[int, int]]:
    """The pairs of images that nobody voted on and that do not follow from votes, in the order of asking.

    Nobody is asked whether a is better than c once a was better than b, and b better than c; or about two images that
    are the same. A tie or a skip says nothing about third images.

    Args:
        images: names of G images; equal names are equal images.

    Returns:
        Indices (i, j), i < j: (0, 1), (0, 2), (1, 2), (0, 3), ...
    """
    better = _better(images, verdict)
    order = sorted(combinations(range(len(images)), 2), key=lambda pair: pair[::-1])
    return [
        (i, j)
        for i, j in order
        if images[i] != images[j]
        and verdict(images[i], images[j]) is None
        and (i, j) not in better
        and (j, i) not in better
    ]


def standings(images: Sequence[str], verdict: Verdict) -> list[Standing]:
    """The standing of each of G images; pairs that were skipped or not voted on do not count."""
    better = _better(images, verdict)
    places = []
    for i, name in enumerate(images):
        others = [j for j in range(len(images)) if j != i]
        tied = [j for j in others if images[j] == name or verdict(name, images[j]) == "tie"]
        places.append(
            Standing(
                won=sum((i, j) in better for j in others), lost=sum((j, i) in better for j in others), tied=len(tied)
            )
        )
    return places


def _better(images: Sequence[str], verdict: Verdict) -> set[tuple[int, int]]:
    """(i, j) for every image i that is better than j, by a vote or because something between them says so."""
    pairs = [(i, j) for i in range(len(images)) for j in range(len(images)) if images[i] != images[j]]
    better = {(i, j) for i, j in pairs if verdict(images[i], images[j]) == "left"}
    tied = {(i, j) for i, j in pairs if verdict(images[i], images[j]) in ("tie", "skip")}
    while True:
        follows = {(i, k) for i, j in better for j2, k in better if j == j2 and i != k} - better - tied
        if not follows:
            return better
        better |= follows
