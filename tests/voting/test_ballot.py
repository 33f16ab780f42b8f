"""What votes over pairs come to, on paper."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlt2i.voting.ballot import open_pairs, standings

OTHER = {"left": "right", "right": "left", "tie": "tie", "skip": "skip"}


def verdict_of(votes: dict[str, str]):
    """Votes as {"ab": "left"}: of a and b, a is better."""
    both = votes | {pair[::-1]: OTHER[choice] for pair, choice in votes.items()}
    return lambda one, other: both.get(one + other)


def scores(images: str, votes: dict[str, str]) -> list[float | None]:
    return [standing.score for standing in standings(images, verdict_of(votes))]


@pytest.mark.parametrize(
    ("images", "votes", "expected"),
    [
        ("ab", {"ab": "left"}, [1, 0]),
        ("ab", {"ab": "right"}, [0, 1]),
        ("ab", {"ab": "tie"}, [0.5, 0.5]),
        ("ab", {"ab": "skip"}, [None, None]),
        ("ab", {}, [None, None]),
        ("aa", {}, [0.5, 0.5]),  # the same image twice needs no vote
        ("abc", {"ab": "left", "bc": "left"}, [1, 0.5, 0]),  # a over c follows
        ("abc", {"ab": "left", "ac": "skip", "bc": "skip"}, [1, 0, None]),
        ("abc", {"ab": "tie", "ac": "left", "bc": "left"}, [0.75, 0.75, 0]),
        ("abcd", {"ab": "left", "bc": "left", "cd": "left"}, [1, 2 / 3, 1 / 3, 0]),
        ("abcd", {"ab": "left"}, [1, 0, None, None]),  # the others were never compared
        ("aba", {"ab": "left"}, [0.75, 0, 0.75]),  # a beats b, and ties with itself
    ],
)
def test_scores_by_hand(images, votes, expected):
    assert scores(images, votes) == expected


def test_what_follows_is_not_asked():
    assert open_pairs("abc", verdict_of({})) == [(0, 1), (0, 2), (1, 2)]
    assert open_pairs("abc", verdict_of({"ab": "left", "bc": "left"})) == []
    assert open_pairs("abc", verdict_of({"ab": "left", "ac": "left"})) == [(1, 2)]
    assert open_pairs("abc", verdict_of({"ab": "tie", "bc": "left"})) == [(0, 2)]  # ties are not passed on
    assert open_pairs("aab", verdict_of({"ab": "skip"})) == []


@given(st.permutations("abcd"), st.integers(2, 4))
def test_a_person_with_an_order_is_understood(order, count):
    images, votes = "abcd"[:count], {}
    while pairs := open_pairs(images, verdict_of(votes)):
        i, j = pairs[0]
        votes[images[i] + images[j]] = "left" if order.index(images[i]) < order.index(images[j]) else "right"
    assert len(votes) <= count * (count - 1) // 2
    best_first = sorted(images, key=order.index)
    expected = [1 - best_first.index(image) / (count - 1) for image in images]
    assert scores(images, votes) == pytest.approx(expected)


def test_votes_that_go_in_a_circle_tie():
    circle = {"ab": "left", "bc": "left", "ca": "left"}  # as two groups with images in common can come to
    for images in permutations("abc"):
        assert scores("".join(images), circle) == [0.5, 0.5, 0.5]
        assert open_pairs(images, verdict_of(circle)) == []
