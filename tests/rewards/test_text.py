from __future__ import annotations

import random

import pytest

from rlt2i.rewards.ocr import match_score
from rlt2i.rewards.text import (
    comparable,
    edit_distance,
    quoted_text,
    squash,
    substring_distance,
    verdict_of_each,
    verdicts,
)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("abc", "", 3), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("hello", "hell0", 1)],
)
def test_edit_distance_by_hand(first, second, distance):
    assert edit_distance(first, second) == distance
    assert edit_distance(second, first) == distance


def test_substring_distance_is_the_best_over_all_substrings():
    draw = random.Random(1)
    for _ in range(300):
        target = "".join(draw.choice("abc") for _ in range(draw.randint(1, 5)))
        text = "".join(draw.choice("abc") for _ in range(draw.randint(0, 7)))
        pieces = {text[i:j] for i in range(len(text) + 1) for j in range(i, len(text) + 1)}
        assert substring_distance(target, text) == min(edit_distance(target, piece) for piece in pieces)


@pytest.mark.parametrize(
    ("read", "full", "partial"),
    [
        ("hello", 1.0, 1.0),
        ("hell0", 0.8, 0.8),
        ("", 0.0, 0.0),
        ("xyz", 0.0, 0.0),
        ("hell0cafeopen", 0.0, 0.8),  # a near miss next to other writing falls off a cliff
        ("xxhelloyyhello", 1.0, 1.0),  # what surrounds the whole target is free
        ("helo", 0.8, 0.8),
    ],
)
def test_the_reward_by_hand(read, full, partial):
    assert match_score(read, "hello", match="full") == pytest.approx(full)
    assert match_score(read, "hello", match="partial") == pytest.approx(partial)


def test_full_match_is_flow_grpo():
    """Against their rule, written down once more."""
    draw = random.Random(2)
    for _ in range(500):
        read = "".join(draw.choice("abcd") for _ in range(draw.randint(0, 9)))
        target = "".join(draw.choice("abcd") for _ in range(draw.randint(1, 5)))
        distance = 0 if target in read else min(edit_distance(read, target), len(target))
        assert match_score(read, target, match="full") == pytest.approx(1 - distance / len(target))


TYPED_AND_READ = [
    ("Joe\u2019s", "Joe's"),
    ("\u201cYES\u201d", '"YES"'),
    ("Grand\u00a0Opening", "GrandOpening"),
    ("\u55b6\u3000\u696d", "\u55b6\u696d"),
    ("O\u200bP\u2060E\ufeffN", "OPEN"),
    ("cafe\u0301", "CAF\u00c9"),
    ("\uff2f\uff30\uff25\uff2e\uff01", "OPEN!"),
    ("\uff76\uff9e", "\u30ac"),
    ("9\u20135", "9-5"),
    ("wait\u2026", "wait..."),
    ("two\nlines\tand\u2028more", "two lines and more"),
    ("o\ufb03ce", "office"),
    ("A\u00adB", "AB"),
]


@pytest.mark.parametrize(("typed", "read"), TYPED_AND_READ)
def test_a_perfect_picture_of_any_target_scores_one(typed: str, read: str):
    for target, reading in ((typed, read), (read, typed), (typed, typed)):
        wanted, found = comparable(target, "normalised").text, comparable(f"{reading} cafe", "normalised").text
        assert match_score(found, wanted, match="full") == 1  # beside other writing, where a near miss scores 0


def test_signs_that_look_different_stay_different():
    for one, other in (("\u00bd", "12"), ("x\u00b2", "x2"), ("\u2122", "tm"), ("caf\u00e9", "cafe")):
        assert comparable(one, "normalised").text != comparable(other, "normalised").text


def test_the_published_rule_is_flow_grpos():
    for text in ("Grand  Opening\tX", "Joe\u2019s", "\u03a3\u03a3 \u0130 \u00df", "caf\u00e9\n"):
        form = comparable(text, "published")
        assert form.text == squash(text)
        assert len(form.origins) == len(form.text)


def test_both_rules_agree_on_plain_targets():
    draw = random.Random(4)
    for _ in range(200):
        text = "".join(draw.choice("abcXYZ 0129.,!?'\"-:/&%$#()") for _ in range(12))
        assert comparable(text, "normalised").text == comparable(text, "published").text


def test_a_verdict_returns_to_the_characters_that_were_read():
    # "e\u0301" is compared as one, the ellipsis as three of which the last is wrong; a space is free.
    raw = "e\u0301 a\u2026"
    form = comparable(raw, "normalised")
    assert form.text == "\u00e9a..."
    assert verdict_of_each(len(raw), form, verdicts(form.text, "\u00e9a..!", anywhere=False)) == [
        "right", "right", "free", "right", "wrong",
    ]  # fmt: skip


def test_squash_and_quotes():
    assert squash("Grand  Opening\tX") == "grandopening\tx"
    assert quoted_text('a sign "OPEN" and "CLOSED"') == "OPEN"
    assert quoted_text("no quotes") is None
    assert quoted_text('an empty "  " one') is None
    assert quoted_text('one " only') is None


@pytest.mark.parametrize(
    ("text", "target", "anywhere", "signs"),
    [
        ("hello", "hello", False, "+++++"),
        ("hell0", "hello", False, "++++-"),
        ("hexllo", "hello", False, "++-+++"),
        ("helo", "hello", False, "++++"),
        ("xxhelloyy", "hello", True, "..+++++.."),
        ("xxhelloyy", "hello", False, "--+++++--"),
        ("ahell0b", "hello", True, ".++++-."),
        ("", "hello", False, ""),
    ],
)
def test_verdicts_by_hand(text, target, anywhere, signs):
    marks = {"right": "+", "wrong": "-", "free": "."}
    assert "".join(marks[v] for v in verdicts(text, target, anywhere=anywhere)) == signs


@pytest.mark.parametrize("anywhere", [False, True])
def test_verdicts_agree_with_the_distance(anywhere):
    """Right ones are matched in order, and errors cannot exceed the distance."""
    draw = random.Random(3)
    for _ in range(300):
        target = "".join(draw.choice("abc") for _ in range(draw.randint(1, 6)))
        text = "".join(draw.choice("abc") for _ in range(draw.randint(0, 8)))
        found = verdicts(text, target, anywhere=anywhere)
        distance = substring_distance(target, text) if anywhere else edit_distance(target, text)
        right, wrong = found.count("right"), found.count("wrong")
        assert wrong <= distance
        assert right >= len(target) - distance
        assert anywhere or right + wrong == len(text)
