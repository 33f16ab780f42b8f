"""What a reward told of its images, on its way to the report."""

from __future__ import annotations

import torch

from rlt2i.interfaces import RewardOutput
from rlt2i.rewards.agreement import NOTE, all_gather_notes, note


def test_a_note_by_hand():
    assert note({"seen": ["red circle", "blue square"]}) == "seen: red circle, blue square"
    assert note({"seen": []}) == "seen: nothing"
    assert note({"read": "HELO", "target": "HELLO"}) == "read: HELO; target: HELLO"
    assert (
        note({"geneval": {"wrong": ["2 cups"]}, "ocr": {"read": "a\n b"}}) == "geneval: wrong: 2 cups; ocr: read: a b"
    )
    assert note({}) == ""
    assert len(note({"said": "x" * 1000})) == NOTE


def test_every_image_has_a_note_on_every_process():
    scores, valid = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    told = RewardOutput(scores=scores, valid=valid, info=[{"seen": ["ä"]}, {}])
    twice = lambda tensor: torch.cat([tensor, tensor])  # two processes that say the same
    assert all_gather_notes(told, twice) == ["seen: ä", ""] * 2
    assert all_gather_notes(RewardOutput(scores=scores, valid=valid), twice) == [""] * 4
