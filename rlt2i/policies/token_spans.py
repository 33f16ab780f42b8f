"""From the words a user cares about to positions in the token sequences that a network attends to.

Tokenizers report which characters each token stands for, so a phrase is found in the *prompt* first (whole words, any
case, plurals too) and then every token that covers one of its characters counts. Special and padding tokens cover no
character and truncated words have no token; neither can appear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlt2i.types import TokenSpan

Characters = tuple[int, int]

FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about above across after against all along also am among an and another any are around as at be been before
        behind being below beneath beside besides between beyond both but by can could did do does doing down during
        each either every few for from further had has have having he her here hers him his how i if image in inside
        into is it its itself just like many may me might more most much must my near next no nor not of off on once one
        only onto or other our out outside over own per photo photograph picture reads same saying says she should so
        some such than that the their them then there these they this those through to together too toward towards under
        until up upon us very was we were what when where which while who whom whose why will with within without would
        you your
        """,
    )
)
"""Words that name nothing in an image; dropped when the user marks no core phrase."""

_IRREGULAR = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "ox": "oxen",
}  # fmt: skip
_QUOTED = re.compile(r"\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|(?<!\w)['\u2018]([^'\u2019]+)['\u2019](?!\w)")
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_QUOTES = "\"'\u201c\u201d\u2018\u2019"


def find_phrase(phrase: str, text: str) -> list[Characters]:
    """Every place where the text says the phrase: whole words, any case, any spacing, last word singular or plural.

    Args:
        phrase: one or more words; surrounding quotes are ignored.
        text: the prompt.

    Returns:
        Character ranges (start, end), in order; empty when the text does not say it.
    """
    *head, last = phrase.strip().strip(_QUOTES).split() or [""]
    if not last:
        return []
    pattern = r"\s+".join([*map(re.escape, head), f"(?:{'|'.join(map(re.escape, _number_forms(last)))})"])
    before = r"(?<!\w)" if re.match(r"\w", (head or [last])[0]) else ""
    after = r"(?!\w)" if re.search(r"\w$", last) else ""
    return [match.span() for match in re.finditer(before + pattern + after, text, re.IGNORECASE)]


def _number_forms(word: str) -> list[str]:
    """The word and its plurals, longest first."""
    low = word.lower()
    forms = {word, _IRREGULAR.get(low, word)}
    if word[-1:].isalpha():
        forms |= {word + "s", word + "es"}
        if low.endswith("y"):
            forms.add(word[:-1] + "ies")
        if low.endswith("f"):
            forms.add(word[:-1] + "ves")
        if low.endswith("fe"):
            forms.add(word[:-2] + "ves")
    return sorted(forms, key=len, reverse=True)


def content_phrases(text: str) -> tuple[str, ...]:
    """What a prompt is about when nobody says: its quoted strings, each whole, and its words but function words."""
    quoted = list(_QUOTED.finditer(text))
    found = [(match.start(), next(filter(None, match.groups())).strip()) for match in quoted]
    for match in _WORD.finditer(text):
        inside_quotes = any(quote.start() <= match.start() < quote.end() for quote in quoted)
        if not inside_quotes and match[0].lower() not in FUNCTION_WORDS:
            found.append((match.start(), match[0]))
    unique = {phrase.lower(): phrase for _, phrase in sorted(found, reverse=True) if phrase}
    return tuple(reversed(unique.values()))


def covering_tokens(ranges: Sequence[Characters], text: str, offsets: Sequence[Characters]) -> tuple[int, ...]:
    """Indices of the tokens that stand for a visible character within one of the ranges.

    Args:
        ranges: character ranges of a phrase.
        text: the prompt.
        offsets: per token, the characters it stands for; (0, 0) for special and padding tokens.
    """
    visible = {i for start, end in ranges for i in range(start, end) if not text[i].isspace()}
    return tuple(token for token, (start, end) in enumerate(offsets) if visible.intersection(range(start, end)))


def find_spans(
    text: str, core: Sequence[str], streams: Mapping[str, Sequence[Characters]], starts: Mapping[str, int]
) -> tuple[TokenSpan, ...]:
    """The core phrases of one prompt among its tokens.

    Args:
        text: the prompt.
        core: its core phrases; empty means `content_phrases(text)`.
        streams: text stream -> character range of each token.
        starts: text stream -> where the stream begins in the joint text sequence.

    Returns:
        One span per phrase that has at least one token in one stream; all its occurrences count.
    """
    spans = []
    for phrase in core or content_phrases(text):
        ranges = find_phrase(phrase, text)
        found = {name: covering_tokens(ranges, text, offsets) for name, offsets in streams.items()}
        positions = {name: tuple(starts[name] + t for t in tokens) for name, tokens in found.items() if tokens}
        if positions:
            spans.append(TokenSpan(phrase=phrase, positions=positions))
    return tuple(spans)


def character_ranges(tokenizer: object, text: str, max_length: int) -> list[Characters]:
    """The characters that each token of the (truncated, unpadded) prompt stands for; (0, 0) for special tokens.

    Raises:
        ValueError: when the tokenizer cannot tell.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not report character offsets, so core phrases cannot be found among its "
            "tokens. Save a `tokenizer.json` beside it (a fast tokenizer)."
        )
    encoded = tokenizer(  # type: ignore[operator]
        text, truncation=True, max_length=max_length, return_offsets_mapping=True, return_special_tokens_mask=True
    )
    pairs = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    return [(0, 0) if special else (int(offset[0]), int(offset[1])) for offset, special in pairs]


def span_tensors(spans: Sequence[Sequence[TokenSpan]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The spans of P prompts as the tensors that attention capture reads.

    Returns:
        tokens [P, M] positions in the joint text sequence (padded with 0) and members [P, M, K] bool, whether token m
        belongs to concept k. M and K are the largest of the batch, at least 1.
    """
    positions = [[sorted({t for where in span.positions.values() for t in where}) for span in row] for row in spans]
    unique = [sorted({t for concept in row for t in concept}) for row in positions]
    num_tokens, num_concepts = (max([1, *map(len, rows)]) for rows in (unique, positions))
    tokens = torch.zeros(len(spans), num_tokens, dtype=torch.long)
    members = torch.zeros(len(spans), num_tokens, num_concepts, dtype=torch.bool)
    for prompt, (selected, concepts) in enumerate(zip(unique, positions, strict=True)):
        tokens[prompt, : len(selected)] = torch.tensor(selected, dtype=torch.long)
        for concept, where in enumerate(concepts):
            members[prompt, [selected.index(t) for t in where], concept] = True
    return tokens.to(device), members.to(device)
