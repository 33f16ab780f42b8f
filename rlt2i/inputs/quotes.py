"""Which words of a prompt stand in quotes: the text that an image is asked to show."""

from __future__ import annotations

import re
from collections.abc import Iterator

import attrs

from rlt2i.inputs.typography import is_blank

_CLOSING = {
    "\u201c": "\u201d", "\u201e": "\u201c\u201d", "\u201f": "\u201d", "\u00ab": "\u00bb", "\u00bb": "\u00ab\u00bb",
    "\u201d": "\u201d", "\u300c": "\u300d", "\u300e": "\u300f", "\uff62": "\uff63", "\ufe41": "\ufe42",
    "\ufe43": "\ufe44", "\u301d": "\u301e\u301f",
}  # fmt: skip
"""Opening quote -> what closes it: English, German, Polish, French, Danish, Swedish, Chinese and Japanese habits."""
_NESTS = frozenset("\u300c\u300e\uff62\ufe41\ufe43\u00ab")
"""Quotes whose opening and closing signs are used for nothing else, so that one can stand within another."""
_STRAIGHT = '"\uff02'
_SIGN = re.compile(rf"\\*[{_STRAIGHT}]+|[{''.join(_CLOSING)}]|(?<!`)``(?!`)|(?<![\w'`])''(?!')")
_TYPED = re.compile(r"(?:``|'')((?!\s)[^`]*?[^`'\s])''(?!')")
"""``OPEN'' as TeX has it, and two apostrophes before and after. Between pairs of backticks alone stands code."""
_DOUBLED = re.compile(rf"[{_STRAIGHT}]{{2}}((?!\s)[^{_STRAIGHT}]*[^{_STRAIGHT}\s\\])\\*[{_STRAIGHT}]{{2}}")
_SINGLE = re.compile(r"(?<![\w'\u2019])['\u2018\u201a\u2039]([^'\u2018\u2019\u2039\u203a]+)['\u2019\u2018\u203a](?!\w)")
_INCHES = re.compile(r"[0-9\u00bc-\u00be\u2150-\u215e]\Z")
_AFTER = re.compile(r"[\s,.;:!?)\]}\-\u2013\u2014x\u00d7/]|\Z")


@attrs.frozen
class Quoted:
    """A quoted text: what is quoted, and the characters [start, end) of the prompt, quotes included."""

    text: str
    start: int
    end: int


def quoted_texts(prompt: str, *, single: bool = False) -> tuple[Quoted, ...]:
    r"""The texts in double quotes, in order and without those that are blank.

    Straight quotes may be escaped (`\"OPEN\"`) or doubled, as JSON and CSV do; typographic ones pair as languages
    pair them: “ ”, „ “, « », » «, 「 」, 『 』; TeX writes ``OPEN''. An inch sign (18") quotes nothing.

    Args:
        prompt: any text.
        single: whether 'single' quotes count, too, where they are no apostrophes.
    """
    quotes = list(_double(prompt))
    if single:
        taken = [range(quote.start, quote.end) for quote in quotes]
        for match in _SINGLE.finditer(prompt):
            if not any(match.start() in outer for outer in taken):
                quotes.append(Quoted(match[1], match.start(), match.end()))
    visible = (attrs.evolve(quote, text=quote.text.strip()) for quote in quotes if not is_blank(quote.text))
    return tuple(sorted(visible, key=lambda quote: quote.start))


def _double(prompt: str) -> Iterator[Quoted]:
    position = 0
    while match := _SIGN.search(prompt, position):
        quote = _opened(prompt, match)
        if quote is not None:
            yield quote
        position = match.end() if quote is None else quote.end


def _opened(prompt: str, sign: re.Match[str]) -> Quoted | None:
    """The quote that a sign opens; None when it opens none."""
    if sign[0][-1] in _STRAIGHT:
        return _straight(prompt, sign)
    if sign[0] in _CLOSING:
        return _paired(prompt, sign.start())
    typed = _TYPED.match(prompt, sign.start())
    return Quoted(typed[1], typed.start(), typed.end()) if typed else None


def _straight(prompt: str, opening: re.Match[str]) -> Quoted | None:
    """The quote that a run of straight quotes opens; None when it opens none."""
    run = opening[0].lstrip("\\")
    if len(run) > 1:
        within = _DOUBLED.match(prompt, opening.end() - 2)
        if within:
            return Quoted(within[1], opening.start(), within.end())
        if len(run) == 2:
            return None  # "" quotes nothing
    if _is_inch(prompt, opening):
        return None
    signs = [sign for sign in _SIGN.finditer(prompt, opening.end()) if sign[0][-1] in _STRAIGHT]
    if signs and _around_all(prompt, opening, signs[-1]) and _DOUBLED.search(prompt, opening.end()):
        return None  # a row of a CSV file kept its quotes: around all of it, doubled within
    for number, sign in enumerate(signs):
        following = signs[number + 1] if number + 1 < len(signs) else None
        if following is not None and _is_inch(prompt, sign) and _only_closes(prompt, following):
            continue  # "18" TV" is one text
        return Quoted(prompt[opening.end() : sign.start()], opening.start(), _first_sign_end(sign))
    smart = prompt.find("\u201d", opening.end())
    return Quoted(prompt[opening.end() : smart], opening.start(), smart + 1) if smart >= 0 else None


def _first_sign_end(sign: re.Match[str]) -> int:
    """Of a closing run, one sign closes; what is left may open the next quote ("A""B")."""
    return sign.start() + len(sign[0]) - len(sign[0].lstrip("\\")) + 1


def _is_inch(prompt: str, sign: re.Match[str]) -> bool:
    """Whether a single straight quote follows a number, and nothing that is quoted follows it."""
    return len(sign[0]) == 1 and bool(_INCHES.search(prompt[: sign.start()])) and bool(_AFTER.match(prompt, sign.end()))


def _only_closes(prompt: str, sign: re.Match[str]) -> bool:
    before = prompt[: sign.start()]
    return not before[-1:].isspace() and not _INCHES.search(before) and bool(_AFTER.match(prompt, sign.end()))


def _around_all(prompt: str, first: re.Match[str], last: re.Match[str]) -> bool:
    return not prompt[: first.start()].strip() and not prompt[last.end() :].strip()


def _paired(prompt: str, start: int) -> Quoted | None:
    """The quote that a typographic sign opens; None when it opens none."""
    opening, depth = prompt[start], 0
    closing = _CLOSING[opening]
    before, after = prompt[start - 1 : start], prompt[start + 1 : start + 2]
    if opening == "\u201d" and (before.isalnum() or not after or after.isspace()):
        return None  # closes, or means inches
    for index in range(start + 1, len(prompt)):
        if prompt[index] in closing:
            if not depth:
                return Quoted(prompt[start + 1 : index], start, index + 1)
            depth -= 1
        elif prompt[index] == opening and opening in _NESTS:
            depth += 1
    if opening == "\u201c" and (straight := prompt.find('"', start + 1)) >= 0:
        return Quoted(prompt[start + 1 : straight], start, straight + 1)
    return None
