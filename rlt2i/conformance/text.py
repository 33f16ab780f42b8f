"""Laws of encoded prompts: rows, company, where words are."""

from __future__ import annotations

import torch
from torch import Tensor

from rlt2i.conformance.subject import GROUP_SIZE, TEXTS, Subject, require
from rlt2i.types import Prompts

HARD = ("", " ", "NEON Cats", "zwei Füchse", "七つの星 and a cat", 'a sign saying "Öl & Essig"', "cat " * 400)
"""Prompts that tokenizers stumble over: nothing, capitals, other scripts, quotes, more than fits."""


def groups_of_rows(subject: Subject) -> None:
    """encode gives one row per rollout, those of a prompt adjacent, and where the words of each prompt are."""
    rows = subject.conditioning.rows.tolist()
    expected = [prompt for prompt in range(len(TEXTS)) for _ in range(GROUP_SIZE)]
    require(
        rows == expected,
        f"conditioning.rows is {rows} for {len(TEXTS)} prompts of {GROUP_SIZE} rollouts each, expected {expected}: "
        "one entry per rollout, the rollouts of a prompt adjacent (repeat_interleave).",
    )
    for name, tensor in subject.conditioning.tensors.items():
        require(
            len(tensor) >= len(TEXTS),
            f"conditioning.tensors[{name!r}] has {len(tensor)} rows for {len(TEXTS)} prompts; it holds a row a prompt.",
        )
    spans = len(subject.conditioning.token_spans)
    require(
        spans >= len(TEXTS) or not subject.attention_names,
        f"conditioning.token_spans has {spans} entries for {len(TEXTS)} prompts; credit looks words up there.",
    )


def company(subject: Subject) -> None:
    """How a prompt is encoded does not depend on the prompts beside it, or on what was encoded before."""
    together = subject.conditioning.tensors
    for index, words in enumerate(TEXTS):
        for name, tensor in subject.policy.encode(Prompts.of((words,))).tensors.items():
            if not tensor.is_floating_point():
                continue
            alone, beside = tensor[0], together[name][index]
            require(
                alone.ndim == beside.ndim and torch.equal(_cropped(beside, alone), alone),
                f"{name!r} of {words!r} is another one when the prompt is encoded alone, though seeds and caches take "
                "it for the same. Encode prompts one by one, and pad at the end.",
            )


def _cropped(tensor: Tensor, like: Tensor) -> Tensor:
    """Without the padding that company may bring."""
    return tensor[tuple(slice(side) for side in like.shape)]


def words_are_found(subject: Subject) -> str:
    """Token spans name words of the prompt, and lie inside the text; special and padding tokens do not count."""
    spans = subject.conditioning.token_spans
    if not subject.attention_names:
        return "no attention maps, so no words to find"
    phrases = {span.phrase for span in spans[0]}
    require(
        len(phrases) >= 2,
        f"of {TEXTS[0]!r} only {sorted(phrases) or 'nothing'} is found among the tokens. Does text_streams say which "
        "characters each token stands for, with those of a template taken off?",
    )
    for words, row in zip(TEXTS, spans, strict=False):
        for span in row:
            require(
                span.phrase.lower() in words.lower() and all(min(p) >= 0 for p in span.positions.values()),
                f"the span {span} is no part of {words!r}.",
            )
    require(not spans[TEXTS.index("")], f"the empty prompt has words: {spans[TEXTS.index('')]}.")
    places = {span.phrase: set().union(*map(set, span.positions.values())) for span in spans[0]}
    shared = {(a, b) for a in places for b in places if a < b and places[a] & places[b]}
    require(not shared, f"different words of {TEXTS[0]!r} claim the same tokens: {sorted(shared)[:2]}.")
    return f"{len(spans[0])} phrases of {TEXTS[0]!r}"


def hard_prompts(subject: Subject) -> None:
    """Empty, long, quoted and non-Latin prompts are encoded, and stay inside the prompt."""
    encoded = subject.policy.encode(Prompts.of(HARD))
    for name, tensor in encoded.tensors.items():
        finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
        require(finite, f"{name!r} holds NaN or infinity for one of {HARD[:6]}.")
    for words in HARD:
        for stream, (first, ranges) in subject.policy.text_streams(words).items():
            inside = all(0 <= a <= b <= len(words) for a, b in ranges)
            require(
                inside,
                f"text_streams({words[:30]!r}): stream {stream!r} (from token {first}) points outside of the prompt: "
                f"{[r for r in ranges if not 0 <= r[0] <= r[1] <= len(words)][:3]}. Take those of a template off.",
            )


LAWS = (groups_of_rows, company, words_are_found, hard_prompts)
