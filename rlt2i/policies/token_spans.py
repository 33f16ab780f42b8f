"""From the words a user cares about to positions in the token sequences that a network attends to.

Tokenizers report which characters each token stands for, so a phrase is found in the *prompt* first (`find_phrase`)
and then every token that covers one of its characters counts. Special and padding tokens cover no character, and a word
that the token limit cuts off or cuts in two has none; neither can appear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlt2i.functional.transfer import to_device
from rlt2i.inputs.phrases import Characters, content_phrases, find_phrase
from rlt2i.inputs.typography import is_blank, is_invisible
from rlt2i.types import TokenSpan


def covering_tokens(ranges: Sequence[Characters], text: str, offsets: Sequence[Characters]) -> tuple[int, ...]:
    """Indices of the tokens that stand for a visible character within one of the ranges.

    Args:
        ranges: character ranges of a phrase.
        text: the prompt.
        offsets: per token, the characters it stands for; (0, 0) for special and padding tokens.
    """
    reached = max((end for _, end in offsets), default=0)
    whole = {i for start, end in ranges for i in range(start, _whole_words_before(reached, start, end, text))}
    visible = {i for i in whole if not text[i].isspace() and not is_invisible(text[i])}
    return tuple(token for token, (start, end) in enumerate(offsets) if visible.intersection(range(start, end)))


def _whole_words_before(cut: int, start: int, end: int, text: str) -> int:
    """Where the words of [start, end) end that lie before a cut; a word in two pieces is left out."""
    if is_blank(text[cut:end]):
        return end
    words = [word.end() + start for word in re.finditer(r"\S+", text[start:end])]
    return max((word for word in words if word <= cut), default=start)


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
        covering = {name: covering_tokens(ranges, text, offsets) for name, offsets in streams.items()}
        positions = {name: tuple(starts[name] + t for t in tokens) for name, tokens in covering.items() if tokens}
        if positions:
            spans.append(TokenSpan(phrase=phrase, positions=positions))
    return tuple(spans)


def character_ranges(
    tokenizer: object, text: str, max_length: int, *, padded: bool = False, special: bool = True
) -> list[Characters]:
    """The characters that each token of the truncated prompt stands for; (0, 0) for special and padding tokens.

    Args:
        max_length: of the prompt in tokens.
        padded: pad it to this length, on the side that the tokenizer pads.
        special: add special tokens; no, where a template has written them.

    Raises:
        ValueError: when the tokenizer cannot tell.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not report character offsets, so core phrases cannot be found among its "
            "tokens. Save a `tokenizer.json` beside it (a fast tokenizer)."
        )
    encoded = tokenizer(  # type: ignore[operator]
        text,
        truncation=True,
        max_length=max_length,
        padding="max_length" if padded else False,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
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
    return to_device(tokens, device), to_device(members, device)
