from __future__ import annotations

import pytest
import torch

from rlt2i.inputs.phrases import find_phrase
from rlt2i.policies.token_spans import (
    character_ranges,
    covering_tokens,
    find_spans,
    span_tensors,
)
from rlt2i.types import TokenSpan

CLIP_LENGTH = 16
T5_LENGTH = 12


def test_covering_tokens_ignores_whitespace_specials_and_padding():
    text = "a red cat"
    offsets = [(0, 0), (0, 1), (1, 5), (5, 9), (0, 0), (0, 0)]  # sentencepiece tokens may own the space before a word
    assert covering_tokens(find_phrase("red", text), text, offsets) == (2,)
    assert covering_tokens(find_phrase("cat", text), text, offsets) == (3,)


def test_spans_with_a_clip_tokenizer_by_hand(clip_tokenizer):
    # <bos> a red cat and two c o w s <eos>: "cows" is spelled out; positions count the <bos>.
    text = "A red cat and two cows"
    offsets = character_ranges(clip_tokenizer, text, CLIP_LENGTH)
    assert len(offsets) == 11
    spans = find_spans(text, ("red cat", "cow", "and"), {"clip": offsets}, {"clip": 0})
    assert [span.positions["clip"] for span in spans] == [(2, 3), (6, 7, 8, 9), (4,)]


def test_spans_with_a_t5_tokenizer_by_hand(t5_tokenizer):
    # _a _red _cat _and _ c o w </s>: the fixture's words are whole, "cow" is a word mark and its letters.
    text = "a red cat and cow"
    offsets = character_ranges(t5_tokenizer, text, T5_LENGTH)
    spans = find_spans(text, ("cat", "cow"), {"t5": offsets}, {"t5": 100})
    tokens = t5_tokenizer.convert_ids_to_tokens(t5_tokenizer(text).input_ids)
    assert [tokens[p - 100] for p in spans[0].positions["t5"]] == ["\u2581cat"]
    assert [tokens[p - 100] for p in spans[1].positions["t5"]] == ["\u2581", "c", "o", "w"]


def test_all_occurrences_count_in_every_stream(clip_tokenizer, t5_tokenizer):
    text = "cat dog cat"
    streams = {
        "clip": character_ranges(clip_tokenizer, text, CLIP_LENGTH),
        "t5": character_ranges(t5_tokenizer, text, T5_LENGTH),
    }
    (span,) = find_spans(text, ("cat",), streams, {"clip": 0, "t5": 16})
    assert span.positions == {"clip": (1, 3), "t5": (16, 18)}


def test_truncated_words_are_absent_from_that_stream_only(clip_tokenizer, t5_tokenizer):
    text = " ".join(["a"] * 12) + " red zebra cat"
    clip = character_ranges(clip_tokenizer, text, CLIP_LENGTH)
    assert len(clip) == CLIP_LENGTH
    assert clip[0] == clip[-1] == (0, 0)
    long_stream = character_ranges(t5_tokenizer, text, 40)
    spans = find_spans(text, ("red", "cat"), {"clip": clip, "t5": long_stream}, {"clip": 0, "t5": 16})
    assert [sorted(span.positions) for span in spans] == [["clip", "t5"], ["t5"]]
    assert [span.phrase for span in find_spans(text, ("red", "cat"), {"clip": clip}, {"clip": 0})] == ["red"]


def test_no_fragment_of_a_word_that_the_limit_cuts_in_two_counts(clip_tokenizer):
    # <bos>, twelve a's, red, and two letters of "zebra": the token limit falls inside the word.
    text = " ".join(["a"] * 12) + " zebra cat"
    offsets = character_ranges(clip_tokenizer, text, CLIP_LENGTH)
    cut = max(end for _, end in offsets)
    assert 0 < cut - text.index("zebra") < len("zebra")
    assert find_spans(text, ("zebra",), {"clip": offsets}, {"clip": 0}) == ()
    (span,) = find_spans(text, ("a zebra",), {"clip": offsets}, {"clip": 0})
    assert span.positions["clip"] == (12,)  # the last "a", which is whole


def test_a_phrase_typed_otherwise_finds_the_tokens_of_the_prompt(clip_tokenizer):
    text = "a re\u0301d\u00a0cat\u2019s"
    offsets = [(0, 0), (0, 1), (2, 6), (7, 10), (10, 12), (0, 0)]
    (span,) = find_spans(text, ("R\u00c9D  CAT'S",), {"clip": offsets}, {"clip": 0})
    assert span.positions["clip"] == (2, 3, 4)


def test_special_and_padding_tokens_never_count(clip_tokenizer):
    text = 'a cat . "hello world"'
    offsets = character_ranges(clip_tokenizer, text, CLIP_LENGTH)
    everything = find_spans(text, tuple(text.split()), {"clip": offsets}, {"clip": 0})
    touched = {p for span in everything for p in span.positions["clip"]}
    ids = clip_tokenizer(text).input_ids
    assert not touched & {i for i, token in enumerate(ids) if token in clip_tokenizer.all_special_ids}
    assert max(touched) < len(ids) - 1


def test_a_prompt_without_content_has_no_spans(clip_tokenizer):
    offsets = character_ranges(clip_tokenizer, "a the of", CLIP_LENGTH)
    assert find_spans("a the of", (), {"clip": offsets}, {"clip": 0}) == ()


def test_slow_tokenizers_are_refused():
    with pytest.raises(ValueError, match="character offsets"):
        character_ranges(object(), "a cat", 8)


def test_span_tensors_by_hand():
    spans = [
        (
            TokenSpan(phrase="red cat", positions={"clip": (2, 3), "t5": (18,)}),
            TokenSpan(phrase="cat", positions={"clip": (3,)}),
        ),
        (),
    ]
    tokens, members = span_tensors(spans, "cpu")
    assert tokens.tolist() == [[2, 3, 18], [0, 0, 0]]
    assert members[0].int().T.tolist() == [[1, 1, 1], [0, 1, 0]]
    assert not members[1].any()
    assert span_tensors([(), ()], "cpu")[1].shape == torch.Size([2, 1, 1])
