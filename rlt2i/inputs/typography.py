"""Text that looks the same, written the same: the form in which a prompt is compared with what was typed or read.

The same sign can be typed in many ways: a straight or a curly apostrophe, a space or a no-break space, one code point
or a letter and an accent, half or full width, with or without characters that show nothing. `normal_form` removes
those differences and remembers where every character came from. It is not Unicode's NFKC, which would also turn signs
that look different into each other: ½, ², ™ and ① stay.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import attrs

_SINGLE_QUOTES = "'\u2018\u2019\u201a\u201b\u2032\u2035\u02b9\u02bb\u02bc\u02bd\u02c8`\u00b4"
_DOUBLE_QUOTES = '"\u201c\u201d\u201e\u201f\u2033\u2036\u00ab\u00bb\u02ba\u301d\u301e\u301f'
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\u2e3a\u2e3b\u2796"
_ALIKE = {
    **dict.fromkeys(_SINGLE_QUOTES, "'"),
    **dict.fromkeys(_DOUBLE_QUOTES, '"'),
    **dict.fromkeys(_DASHES, "-"),
    "\u2039": "<", "\u203a": ">",
    "\u2024": ".", "\u2025": "..", "\u2026": "...", "\u22ef": "...",
    "\u2044": "/", "\u2215": "/",
    "\u02dc": "~", "\u301c": "~",
    "\u2800": " ",
}  # fmt: skip
"""Signs that a reader, or an OCR model, does not tell apart."""

_SAME_SIGN = {"<wide>", "<narrow>", "<small>", "<vertical>", "<noBreak>", "<font>"} | {
    "<initial>", "<medial>", "<final>", "<isolated>",
}  # fmt: skip
"""Unicode's compatibility decompositions that change a sign's width, place or joining, and not what it says."""

_LIGATURES = range(0xFB00, 0xFB18)
_VISIBLE_FORMAT = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Arabic, Syriac and Kaithi number signs: the only format characters that are drawn."""
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")


@attrs.frozen
class NormalForm:
    """A text in normal form, and where each of its characters came from.

    Attributes:
        text: N characters.
        origins: N ranges (start, end) of characters of the original; several characters may share one.
    """

    text: str
    origins: tuple[tuple[int, int], ...]

    def original_range(self, start: int, end: int) -> tuple[int, int]:
        """The characters of the original behind the (non-empty) range [start, end) of the normal form."""
        return self.origins[start][0], self.origins[end - 1][1]


def is_invisible(character: str) -> bool:
    """Whether a character draws nothing and takes no room: zero-width, bidirectional and other format characters,
    variation selectors, controls, unpaired surrogates. White space is not invisible."""
    if character.isascii():
        return not character.isprintable() and not character.isspace()
    if character in _BLANK:
        return True
    category = unicodedata.category(character)
    if category == "Cf":
        return character not in _VISIBLE_FORMAT
    if category == "Mn":
        return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return category in {"Cc", "Cs"} and not character.isspace()


def normal_form(text: str, *, fold_case: bool = True) -> NormalForm:
    """The normal form of a text.

    White space of every kind becomes a space and invisible characters go; quotes, apostrophes, dashes and ellipses
    become ASCII; full, half and presentation widths and ligatures become plain letters; accents are composed (NFC);
    case is folded. The length of white space stays, as does everything else.

    Args:
        text: any text.
        fold_case: whether capital and small letters become the same.
    """
    characters: list[str] = []
    origins: list[tuple[int, int]] = []
    for start, end, cluster in _clusters(text):
        composed = unicodedata.normalize("NFC", cluster)
        # Folding case can decompose a sign, and folding or NFC bring in another apostrophe; so both once more.
        spelling = "".join(_ALIKE.get(sign, sign) for sign in (composed.casefold() if fold_case else composed))
        composed = unicodedata.normalize("NFC", spelling)
        characters.extend(composed)
        origins.extend([(start, end)] * len(composed))
    return NormalForm("".join(characters), tuple(origins))


def normalised(text: str, *, fold_case: bool = True) -> str:
    """The normal form of a text, each run of white space one space, none at the ends."""
    return " ".join(normal_form(text, fold_case=fold_case).text.split())


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space and invisible characters alone."""
    return all(character.isspace() or is_invisible(character) or character == "\u2800" for character in text)


def lone_surrogate(text: str) -> int | None:
    """Where a text holds half of a surrogate pair, which no encoder accepts; None when it holds none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _clusters(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, its spelling) of every stretch of the text that NFC composes on its own."""
    start, end, cluster = 0, 0, ""
    for index, character in enumerate(text):
        spelling = _spelling(character)
        if not spelling:
            continue
        if cluster and not _stands_alone(cluster, spelling):
            end, cluster = index + 1, cluster + spelling
            continue
        if cluster:
            yield start, end, cluster
        start, end, cluster = index, index + 1, spelling
    if cluster:
        yield start, end, cluster


def _stands_alone(before: str, spelling: str) -> bool:
    """Whether NFC treats a character and what comes before it separately."""
    if spelling.isascii():
        return True
    if unicodedata.combining(spelling[0]):
        return False
    compose = unicodedata.normalize
    return compose("NFC", before + spelling) == compose("NFC", before) + compose("NFC", spelling)


def _spelling(character: str) -> str:
    """What a single character is compared as; empty when it shows nothing."""
    if character in _ALIKE:
        return _ALIKE[character]
    if character.isascii() and character.isprintable():
        return character
    if character.isspace():
        return " "
    if is_invisible(character):
        return ""
    tag = unicodedata.decomposition(character).partition(" ")[0]
    if tag in _SAME_SIGN or ord(character) in _LIGATURES:
        plain = unicodedata.normalize("NFKC", character)
        return "".join(_ALIKE.get(sign, sign) for sign in plain)
    return character
