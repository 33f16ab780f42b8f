from __future__ import annotations

import pytest
import torch

from rlt2i.policies.token_spans import (
    character_ranges,
    content_phrases,
    covering_tokens,
    find_phrase,
    find_spans,
    span_tensors,
)
from rlt2i.types import TokenSpan

CLIP_LENGTH = 16
T5_LENGTH = 12


@pytest.mark.parametrize(
    ("phrase", "text", "found"),
    [
        ("cat", "a cat and a dog", ["cat"]),
        ("cat", "two cats, one Cat's tail", ["cats", "Cat"]),
        ("cat", "a category of bobcat", []),
        ("box", "two boxes beside a box", ["boxes", "box"]),
        ("bus", "three buses", ["buses"]),
        ("knife", "knives and a knife", ["knives", "knife"]),
        ("berry", "berries", ["berries"]),
        ("person", "four people", ["people"]),
        ("hot dog", "a hot  dog and two hot dogs; a dog", ["hot  dog", "hot dogs"]),
        ("HELLO WORLD", 'a sign saying "Hello World"', ["Hello World"]),
        ('"HELLO WORLD"', 'a sign saying "HELLO WORLD"', ["HELLO WORLD"]),
        ("stop!", "a sign: STOP! and stopping", ["STOP!"]),
        ("7", "the numbers 7 and 77", ["7"]),
        ("c++ (old)", "written in C++ (old)", ["C++ (old)"]),
        ("unicorn", "a cat", []),
        ('""', "a cat", []),
        ("  ", "a cat", []),
    ],
)
def test_find_phrase(phrase, text, found):
    assert [text[start:end] for start, end in find_phrase(phrase, text)] == found


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("A photo of a red cat and two dogs.", ("red", "cat", "two", "dogs")),
        ('A sign saying "The End", in red', ("sign", "The End", "red")),
        ("a cat beside a CAT", ("cat",)),
        ("a well-worn shoe", ("well-worn", "shoe")),
        ("the and of", ()),
        ("", ()),
        ("...", ()),
        ("the dog's bowl with 'No Dogs' on it", ("dog's", "bowl", "No Dogs")),
    ],
)
def test_content_phrases(text, phrases):
    assert content_phrases(text) == phrases


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
