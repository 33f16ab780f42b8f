"""What judges are told, and how their marks are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import attrs
from attrs import validators

RubricName = Literal["unified-reward", "unified-reward-2", "alignment"]


@attrs.frozen(kw_only=True)
class Rubric:
    """Instructions for a judge and the marks that it gives.

    Attributes:
        instructions: the text beside the image; {prompt} stands for the prompt.
        marks: name -> regular expression whose only group is the number; the last match counts, because
            judges think aloud before they decide.
        low, high: range of every mark.
    """

    instructions: str = attrs.field(validator=validators.matches_re(r"(?s).*\{prompt\}.*"))
    marks: Mapping[str, str] = attrs.field()
    low: float = 1.0
    high: float = 5.0

    @marks.validator
    def _check_marks(self, _: Any, value: Mapping[str, str]) -> None:
        if not value:
            raise ValueError("Rubric(marks={}): a rubric without marks has no score.")
        for name, pattern in value.items():
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"Rubric: the pattern of {name!r} is no regular expression: {error}.") from None
            if groups != 1:
                raise ValueError(f"Rubric: the pattern of {name!r} has {groups} groups; put the number, alone, in one.")

    def marks_in(self, answer: str) -> dict[str, float]:
        """Every mark of an answer.

        Raises:
            ValueError: when one is missing or out of range.
        """
        marks = {}
        for name, pattern in self.marks.items():
            matches = re.findall(pattern, answer, flags=re.IGNORECASE)
            if not matches:
                raise ValueError(f"no mark for {name!r}")
            marks[name] = float(matches[-1])
            if not self.low <= marks[name] <= self.high:
                raise ValueError(f"{name!r} is {marks[name]:g}, outside {self.low:g} to {self.high:g}")
        return marks


_NUMBER = r"[\s*]*:[\s*\[]*(-?\d+(?:\.\d+)?)"
"""A colon and a number, in the spaces, asterisks and brackets that chat models put around them."""
_RANGE = r"\s*(?:\(\s*1\s*-\s*5\s*\))?"

RUBRICS: Mapping[str, Rubric] = MappingProxyType(
    {
        # What UnifiedReward-7b-v1.5 was trained to answer; Flow-GRPO divides the mark by 5.
        "unified-reward": Rubric(
            instructions=(
                "You are given a text caption and a generated image based on that caption. Your task is to evaluate "
                "this image based on two key criteria:\n"
                "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. "
                "Consider the accuracy of depicted objects, their relationships, and attributes as described in the "
                "caption.\n"
                "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
                "preservation, color accuracy, and overall aesthetic appeal.\n"
                "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
                "Your task is provided as follows:\n"
                "Text Caption: [{prompt}]"
            ),
            marks={"final": rf"final score{_NUMBER}"},
        ),
        # What UnifiedReward 2 was trained to answer.
        "unified-reward-2": Rubric(
            instructions=(
                "You are presented with a generated image and its associated text caption. Your task is to analyze "
                "the image across multiple dimensions in relation to the caption. Specifically:\n"
                "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
                "- Alignment Score: How well the image matches the caption in terms of content.\n"
                "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
                "distortions, etc.).\n"
                "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
                "Output your evaluation using the format below:\n\n"
                "Alignment Score (1-5): X\n"
                "Coherence Score (1-5): Y\n"
                "Style Score (1-5): Z\n\n"
                "Your task is provided as follows:\n"
                "Text Caption: [{prompt}]"
            ),
            marks={name: rf"{name} score{_RANGE}{_NUMBER}" for name in ("alignment", "coherence", "style")},
        ),
        # Ours, for any instruction-following model.
        "alignment": Rubric(
            instructions=(
                "The image was generated for this description:\n{prompt}\n\n"
                "Rate how well it matches: 5 means that every object, attribute, number, relation and written word is "
                "right, 1 that hardly anything is. Think briefly, then end with one line of the form\nScore: N"
            ),
            marks={"alignment": rf"score{_NUMBER}"},
        ),
    }
)
"""Preset name -> rubric."""
