"""Votes on the disk: at once, for the same images again, taken back, and as pairs that offline DPO reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from rlt2i.tasks.pairs import PairFileTask, read_pairs
from rlt2i.voting.folder import VoteFolder


def pictures(count: int, *, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 8, 12), dtype=torch.uint8, generator=draw)


def test_votes_are_found_again_whichever_way_they_are_asked(tmp_path: Path):
    folder = VoteFolder(tmp_path)
    slate = folder.keep(pictures(3), "a cat", {"n": 1})
    a, b, c = slate.images
    folder.cast("a cat", b, a, "left")
    folder.cast("a cat", b, c, "tie")
    again = VoteFolder(tmp_path)
    assert again.slates == [slate]
    assert again.slates[0].metadata == {"n": 1}
    assert (again.verdict("a cat", a, b), again.verdict("a cat", b, a)) == ("right", "left")
    assert (again.verdict("a cat", b, c), again.verdict("a cat", c, b)) == ("tie", "tie")
    assert again.verdict("a dog", a, b) is None  # the images of another prompt
    assert again.keep(pictures(3), "a cat", {"n": 1}) == slate
    assert len((tmp_path / "drawn.jsonl").read_text().splitlines()) == 1


def test_undo_and_a_changed_mind_survive(tmp_path: Path):
    folder = VoteFolder(tmp_path)
    a, b = folder.keep(pictures(2), "a cat", {}).images
    folder.undo(folder.cast("a cat", a, b, "left"))
    assert VoteFolder(tmp_path).verdict("a cat", a, b) is None
    assert (tmp_path / "pairs.jsonl").read_text() == ""
    folder.cast("a cat", a, b, "left")
    folder.cast("a cat", b, a, "left")
    assert VoteFolder(tmp_path).verdict("a cat", a, b) == "right"
    assert len(VoteFolder(tmp_path).pairs()) == 1


def test_a_line_that_was_cut_short_costs_itself_alone(tmp_path: Path):
    folder = VoteFolder(tmp_path)
    a, b, c = folder.keep(pictures(3), "a cat", {}).images
    folder.cast("a cat", a, b, "left")
    with (tmp_path / "votes.jsonl").open("a") as stream:
        stream.write('{"vote": "x", "prompt": "a c')
    folder = VoteFolder(tmp_path)
    folder.cast("a cat", a, c, "left")
    assert [vote.right for vote in VoteFolder(tmp_path).votes] == [b, c]


def test_a_vote_is_flushed_before_cast_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = VoteFolder(tmp_path)
    a, b = folder.keep(pictures(2), "a cat", {}).images
    flushed: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    folder.cast("a cat", a, b, "skip")
    assert str(tmp_path / "votes.jsonl") in flushed


def test_votes_are_a_pair_file(tmp_path: Path):
    folder = VoteFolder(tmp_path)
    slates = [folder.keep(pictures(3, seed=i), f"prompt {i}", {"core": ["prompt"], "tag": "t"}) for i in range(11)]
    for slate in slates:
        a, b, c = slate.images
        folder.cast(slate.prompt, a, b, "left")
        folder.cast(slate.prompt, a, c, "right")
        folder.cast(slate.prompt, b, c, "skip")
    read = read_pairs(tmp_path / "pairs.jsonl")
    assert len(read.pairs) == 22
    assert read.size == (8, 12)
    first, second = read.pairs[:2]
    a, b, c = slates[0].images
    assert [Path(first.metadata[role]).stem for role in ("winner", "loser")] == [a, b]
    assert [Path(second.metadata[role]).stem for role in ("winner", "loser")] == [c, a]
    assert (first.text, first.core, first.category) == ("prompt 0", ("prompt",), "t")
    task = PairFileTask(pairs=str(tmp_path / "pairs.jsonl"))
    assert len(task.eval_prompts(1)) == 1
    assert {"winner", "loser", "tag"} <= task.provides


def test_names_in_a_file_that_somebody_else_wrote_lead_nowhere(tmp_path: Path):
    row = {"prompt": "x", "images": ["../../../etc/passwd"], "metadata": {}}
    (tmp_path / "drawn.jsonl").write_text(json.dumps(row) + "\n[1]\n")
    vote = {"vote": "1", "prompt": "x", "left": "../a", "right": "../b", "choice": "left"}
    (tmp_path / "votes.jsonl").write_text(json.dumps(vote) + "\n")
    folder = VoteFolder(tmp_path)
    assert folder.slates == []
    assert folder.votes == []
