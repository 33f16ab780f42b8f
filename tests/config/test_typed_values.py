"""Values of `--set` as people type them."""

from __future__ import annotations

from typing import Any

import pytest

from rlt2i.config import ConfigError
from rlt2i.config.overrides import apply_overrides

RECIPE = {
    "task": {"type": "PromptFileTask", "train": "a.txt"},
    "objective": {"type": "A", "beta": 1.0},
    "steps": [1, 2],
}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("task.train=my #1 prompts.txt", "my #1 prompts.txt"),
        ("task.train=#1.txt", "#1.txt"),
        ("task.train=it's #1.txt", "it's #1.txt"),
        ("task.train='quoted #1.txt'", "quoted #1.txt"),
        ("task.train=a#b.txt", "a#b.txt"),
        ("task.train=a=b.txt", "a=b.txt"),
        ("task.train=C: drive.txt", {"C": "drive.txt"}),
    ],
)
def test_a_number_sign_is_part_of_the_value(override: str, expected: Any):
    assert apply_overrides(RECIPE, [override])["task"]["train"] == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("objective={type:B}", {"type": "B"}),
        ("objective={type:B,beta:0.5}", {"type": "B", "beta": 0.5}),
        ("objective={type: B, inner: {type:C, on:true}}", {"type": "B", "inner": {"type": "C", "on": True}}),
        ("objective={type: 'a.py:B'}", {"type": "a.py:B"}),
        ("objective={type:a.py:B}", {"type": "a.py:B"}),
        ("objective={type: B}", {"type": "B"}),
    ],
)
def test_a_blank_after_a_colon_may_be_missing(override: str, expected: Any):
    assert apply_overrides(RECIPE, [override])["objective"] == expected


def test_lists_of_parts_may_miss_it_too():
    assert apply_overrides(RECIPE, ["steps=[{type:B}, 3]"])["steps"] == [{"type": "B"}, 3]


def test_what_stays_wrong_says_how_to_write_it():
    with pytest.raises(ConfigError, match=r"(?s)--set objective=\{type: B #1\}: .* Put a text with # into quotes"):
        apply_overrides(RECIPE, ["objective={type: B #1}"])
