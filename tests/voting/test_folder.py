"""Votes on the disk: at once, for the same images again, taken back, and as pairs that offline DPO reads."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from rlt2i.tasks.pairs import PairFileTask, read_pairs
from rlt2i.voting import folder as folder_module
from rlt2i.voting.booth import Booth
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


def test_a_vote_that_the_disk_refuses_does_not_stand_and_can_be_cast_again(tmp_path: Path, monkeypatch):
    folder = VoteFolder(tmp_path)
    booth = Booth(folder)
    folder.keep(pictures(2), "a cat", {})
    folder.keep(pictures(2, seed=1), "a dog", {})
    booth.ask(folder.slates)
    name = booth.state()["question"]["name"]
    append, replace = folder_module.append_lines, folder_module.replace_text

    def half(stream, lines):
        stream.write(lines[0][:20])
        stream.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for again in range(2):
        monkeypatch.setattr(folder_module, "append_lines", half)
        assert not booth.vote(name, "left")
        assert "No space left on device. Disk or quota full" in booth.state()["trouble"]
        assert "choose again" in booth.state()["trouble"]
        assert (booth.state()["votes"], booth.state()["question"]["name"]) == (again, name)
        monkeypatch.setattr(folder_module, "append_lines", append)
        assert booth.vote(name, "left")
        assert (booth.state()["votes"], booth.state()["trouble"]) == (again + 1, "")
        name = (booth.state()["question"] or {}).get("name")
    assert {vote.prompt for vote in VoteFolder(tmp_path).votes} == {"a cat", "a dog"}
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 2

    monkeypatch.setattr(folder_module, "replace_text", full)  # the pair file comes after the vote, which stands
    assert not booth.undo()
    assert "No space" in booth.state()["trouble"]
    monkeypatch.setattr(folder_module, "replace_text", replace)
    assert [vote.prompt for vote in folder.votes] == [vote.prompt for vote in VoteFolder(tmp_path).votes] == ["a cat"]
    folder.write_pairs()
    assert len(read_pairs(tmp_path / "pairs.jsonl").pairs) == 1
