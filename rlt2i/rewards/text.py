"""Comparing what an image says with what it should say. Pure Python on strings of a few dozen characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rlt2i.inputs.quotes import quoted_texts
from rlt2i.inputs.typography import NormalForm, normal_form

Rule = Literal["normalised", "published"]
"""Which characters are the same: those that look the same, or those that are equal in lower case."""

Verdict = Literal["right", "wrong", "free"]
"""Of a character that was read: part of the target, an error that costs, or text that the score ignores."""


def squash(text: str) -> str:
    """Lower case without spaces, as Flow-GRPO compares: tabs, punctuation and accents stay."""
    return text.replace(" ", "").lower()


def comparable(text: str, rule: Rule) -> NormalForm:
    """The characters of a text that are compared, and where each came from.

    Args:
        text: as typed or as read.
        rule: "published" is `squash`; "normalised" is `normal_form` without white space.
    """
    if rule == "published":
        return NormalForm(squash(text), tuple((i, i + 1) for i, sign in enumerate(text) for _ in squash(sign)))
    form = normal_form(text)
    visible = [i for i, character in enumerate(form.text) if not character.isspace()]
    return NormalForm("".join(form.text[i] for i in visible), tuple(form.origins[i] for i in visible))


def verdict_of_each(length: int, form: NormalForm, verdicts_of_form: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts on compared characters, for the characters that they came from: wrong where any is wrong.

    Args:
        length: of the original text.
        form: its characters that were compared.
        verdicts_of_form: one for each of them.
    """
    verdicts: list[Verdict] = ["free"] * length
    for (start, end), verdict in zip(form.origins, verdicts_of_form, strict=True):
        for i in range(start, end):
            if verdicts[i] != "wrong" and verdict != "free":
                verdicts[i] = verdict
    return verdicts


def quoted_text(prompt: str) -> str | None:
    """The first text in double quotes of any kind, or None when there is none; see `quoted_texts`."""
    quotes = quoted_texts(prompt)
    return quotes[0].text if quotes else None


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of a character."""
    return _table(first, second, anywhere=False)[-1][-1]


def substring_distance(target: str, text: str) -> int:
    """The smallest edit distance between `target` and any substring of `text` (Sellers 1980)."""
    return min(_table(target, text, anywhere=True)[-1])


def verdicts(text: str, target: str, *, anywhere: bool) -> list[Verdict]:
    """Which characters of `text` are right, along one cheapest alignment with `target`.

    Args:
        text: what was read.
        target: what it should say.
        anywhere: whether text before and after the target is free.

    Returns:
        One verdict per character of `text`. Characters of the target that are missing have no place and no
        verdict.
    """
    table = _table(target, text, anywhere=anywhere)
    row, column = len(target), len(text)
    verdict: list[Verdict] = ["free" if anywhere else "wrong" for _ in text]
    if anywhere:
        # The last of equals: "hell0" has a wrong character there, rather than a missing one and a free one.
        column = min(range(len(text) + 1), key=lambda j: (table[row][j], -j))
    while row and column:
        equal = target[row - 1] == text[column - 1]
        if table[row][column] == table[row - 1][column - 1] + (not equal):
            verdict[column - 1] = "right" if equal else "wrong"
            row, column = row - 1, column - 1
        elif table[row][column] == table[row][column - 1] + 1:
            verdict[column - 1] = "wrong"
            column -= 1
        else:
            row -= 1
    return verdict


def _table(target: str, text: str, *, anywhere: bool) -> list[list[int]]:
    """Entry [i][j]: the distance of the first i characters of `target` from the text up to j.

    The text starts at 0, or, with `anywhere`, where that is cheapest.
    """
    rows = [[0 if anywhere else j for j in range(len(text) + 1)]]
    for i, wanted in enumerate(target, 1):
        above, row = rows[-1], [i]
        for j, read in enumerate(text, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (wanted != read)))
        rows.append(row)
    return rows
