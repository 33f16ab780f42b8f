"""Where a prompt says a phrase, and what a prompt is about when nobody marks a phrase.

Phrases are compared in normal form (`normal_form`), so a curly apostrophe, a decomposed accent or a no-break space does
not hide them, and the places found are those of the prompt as it was typed. In scripts that put spaces between words a
phrase must be whole words; in Chinese, Japanese, Thai and the like there is no such boundary to ask for.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

from rlt2i.inputs.quotes import quoted_texts
from rlt2i.inputs.typography import normal_form, normalised

Characters = tuple[int, int]
"""A range (start, end) of characters of a text."""

FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about above across after against all along also am among an and another any are around as at be been before
        behind being below beneath beside besides between beyond both but by can cannot could did do does doing down
        during each either every few for from further had has have having he her here hers herself him himself his how
        i if image in inside into is it its itself just let like many may me might more most much must my myself near
        next no nor not of off on once one only onto or other our ours ourselves out outside over own per photo
        photograph picture reads same saying says she should so some such than that the their theirs them themselves
        then there these they this those through to together too toward towards under until up upon us very was we were
        what when where which while who whom whose why will with within without would you your yours yourself
        """,
    )
)
"""Words that name nothing in an image; dropped when the user marks no core phrase."""

_CONTRACTED = re.compile(r"(.*)'(?:s|re|ve|ll|d|m|em)|(?:.*n't|y'all|ma'am|'?tis|'?twas)")
_ENGLISH_ENDING = re.compile(r"'(?:s|t|re|ve|ll|d|m)(?!\w)")
_UNSPACED = re.compile(
    "[\u2e80-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00016fe0-\U0001b2ff\U00020000-\U0003ffff"  # Han, Kana, Bopomofo, Nushu, Tangut
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u19e0-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f"
    "\ua980-\ua9ff\uaa60-\uaadf]"  # Thai, Lao, Tibetan, Burmese, Khmer, Tai, Balinese, Javanese
)
_HANGUL = re.compile("[\u1100-\u11ff\u3131-\u318e\uac00-\ud7ff]")
_KOREAN_ENDINGS = re.compile(
    "들?(?:은|는|이|가|을|를|의|과|와|도|만|으로|로|에서|에게|에|께서|께|한테|이랑|랑|하고|처럼|보다|부터|까지|마다|조차|"
    "밖에|서|이다|입니다|이고|이며)*"
)
"""What Korean writes onto a noun: plural, case, topic, copula."""

_IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "ox": "oxen",
}  # fmt: skip
_QUOTES = "\"'\u300c\u300d\u300e\u300f "


def find_phrase(phrase: str, text: str) -> list[Characters]:
    """Every place where the text says the phrase: any case, any spacing, last word singular or plural, in whatever
    characters the two are typed; whole words in scripts that have spaces between words.

    Args:
        phrase: one or more words; surrounding quotes are ignored.
        text: the prompt.

    Returns:
        Character ranges (start, end), in order; empty when the text does not say it.
    """
    *head, last = normalised(phrase).strip(_QUOTES).split() or [""]
    if not last:
        return []
    before = "".join(re.escape(word) + _gap(word, after) for word, after in pairwise([*head, last]))
    form = normal_form(text)
    ends: dict[int, int] = {}
    for spelling in _number_forms(last):
        # A lookahead, because a place without boundaries may overlap one that has them.
        for match in re.finditer(f"(?=({before}{re.escape(spelling)}))", form.text):
            start, end = match.span(1)
            if start not in ends and _begins_word(form.text, start) and _ends_word(form.text, end):
                ends[start] = end
    ranges: list[Characters] = []
    reached = 0
    for start, end in sorted(ends.items()):
        if start >= reached:
            ranges.append(form.original_range(start, end))
            reached = end
    return ranges


def _gap(word: str, after: str) -> str:
    """What may stand between two words of a phrase."""
    return r"\s*" if _UNSPACED.match(word[-1]) and _UNSPACED.match(after[0]) else r"\s+"


def content_phrases(text: str) -> tuple[str, ...]:
    """What a prompt is about when nobody says: its quoted strings, each whole, and its words but function words."""
    quoted = quoted_texts(text, single=True)
    phrases = [(quote.start, quote.text) for quote in quoted]
    form = normal_form(text)
    for start, end in _words(form.text):
        first, behind = form.original_range(start, end)
        inside_quotes = any(quote.start <= first < quote.end for quote in quoted)
        if not inside_quotes and not _says_nothing(form.text[start:end]):
            phrases.append((first, text[first:behind]))
    unique = {normalised(phrase): phrase for _, phrase in sorted(phrases, reverse=True)}
    return tuple(reversed(unique.values()))


def _says_nothing(word: str) -> bool:
    """Whether a word in normal form is a function word, contracted or not."""
    contracted = _CONTRACTED.fullmatch(word)
    return word in FUNCTION_WORDS or (contracted is not None and (contracted[1] or "the") in FUNCTION_WORDS)


def _words(text: str) -> list[Characters]:
    """Runs of letters, marks and digits; an apostrophe or hyphen between two of them belongs to the word."""
    words: list[Characters] = []
    start = None
    for index in range(len(text) + 1):
        inside = index < len(text) and (
            _is_word(text[index])
            or (start is not None and text[index] in "'-" and index + 1 < len(text) and _is_word(text[index + 1]))
        )
        if inside and start is None:
            start = index
        elif not inside and start is not None:
            words.append((start, index))
            start = None
    return words


def _begins_word(text: str, start: int) -> bool:
    """Whether a phrase can begin at a character of a text in normal form."""
    if not start:
        return True
    before, first = text[start - 1], text[start]
    if before == "'" and text[: start - 1][-1:].isalpha() and _ENGLISH_ENDING.match(text, start - 1):
        return False  # the t of "don't"
    return not _is_mark(first) and not (_spaced(text, start - 1) and _spaced(text, start))


def _ends_word(text: str, end: int) -> bool:
    """Whether a phrase can end before a character of a text in normal form."""
    if end == len(text):
        return True
    if _HANGUL.match(text[end - 1]) and _HANGUL.match(text[end]):
        endings = _KOREAN_ENDINGS.match(text, end)
        behind = endings.end() if endings else end
        return behind > end and not _HANGUL.match(text[behind : behind + 1])
    return not _is_mark(text[end]) and not (_spaced(text, end - 1) and _spaced(text, end))


def _spaced(text: str, index: int) -> bool:
    """Whether a character is part of a word of a script that has spaces between words; a mark is of its letter's."""
    while index and _is_mark(text[index]):
        index -= 1
    return _is_word(text[index]) and not _UNSPACED.match(text[index])


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_" or _is_mark(character)


def _number_forms(word: str) -> list[str]:
    """The word and its plurals, longest first."""
    forms = {word, _IRREGULAR.get(word, word)}
    if word[-1:].isascii() and word[-1:].isalpha():
        forms |= {word + "s", word + "es"}
        if word.endswith("y"):
            forms.add(word[:-1] + "ies")
        if word.endswith("f"):
            forms.add(word[:-1] + "ves")
        if word.endswith("fe"):
            forms.add(word[:-2] + "ves")
    return sorted(forms, key=len, reverse=True)
