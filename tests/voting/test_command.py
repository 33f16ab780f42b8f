"""`rlt2i vote` without a browser: what is drawn, what the file holds, going on after a kill, other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlt2i.cli import main
from rlt2i.tasks.pairs import read_pairs
from rlt2i.voting import command
from rlt2i.voting.booth import Booth
from rlt2i.voting.command import Ballot, vote
from rlt2i.voting.page import ServedPage
from tests.helpers.toy_recipe import clipped


class Page:
    """In place of the page."""

    url = "http://127.0.0.1:1/token/"

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def hold(tmp_path: Path, person, monkeypatch: pytest.MonkeyPatch):
    """Holds a vote on the toy recipe; the person prefers the first name."""
    recipe, pages, wait = clipped(), [], Booth.wait

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "UNDO_SECONDS", 0.0)
    monkeypatch.setattr(command, "AHEAD", 2)

    def run(ballot: Ballot, *, loads: bool = True, interrupted: bool = False) -> int:
        def opened(booth: Booth, *, port: int | None = None) -> Page:
            if interrupted:
                monkeypatch.setattr(Booth, "wait_for_room", lambda self, most: None)
                monkeypatch.setattr(Booth, "wait", interrupt)
            else:
                monkeypatch.setattr(Booth, "wait", wait)
                person(booth, lambda prompt, left, right: "left" if left < right else "right")
            pages.append(Page())
            return pages[-1]

        monkeypatch.setattr(ServedPage, "open", opened)
        policy = recipe.algorithm().load().policy

        def load():
            assert loads, "everything is drawn already"
            return policy

        try:
            return vote(recipe, load, tmp_path / "votes", ballot, say=lambda line: None)
        finally:
            assert pages[-1].closed

    return run


def test_every_prompt_is_drawn_and_voted_on(hold, tmp_path: Path):
    assert hold(Ballot(prompts=5, num_steps=2)) == 5
    read = read_pairs(tmp_path / "votes" / "pairs.jsonl")
    drawn = clipped().task.train_prompts(seed=0, start=0, count=5)
    assert [pair.text for pair in read.pairs] == [prompt.text for prompt in drawn]
    assert [pair.metadata["draw"] for pair in read.pairs] == list(range(5))
    assert [pair.core for pair in read.pairs] == [prompt.core for prompt in drawn]
    for pair in read.pairs:
        winner, loser = (Path(pair.metadata[role]).stem for role in ("winner", "loser"))
        assert winner < loser
    assert hold(Ballot(prompts=5, num_steps=2), loads=False) == 5  # nothing is left to do


def test_prompts_of_the_users_own_and_three_images(hold, tmp_path: Path):
    assert hold(Ballot(prompts=50, texts=("a cat", "a dog"), images=3, num_steps=2)) >= 2 * 2
    read = read_pairs(tmp_path / "votes" / "pairs.jsonl")
    assert {pair.text for pair in read.pairs} == {"a cat", "a dog"}


def test_it_goes_on_where_it_was_cut_off(hold, tmp_path: Path):
    whole = tmp_path / "votes"
    with pytest.raises(KeyboardInterrupt) as stopped:
        hold(Ballot(prompts=5, num_steps=2), interrupted=True)
    assert "the same command goes on" in stopped.value.__notes__[0]
    drawn = (whole / "drawn.jsonl").read_text()
    assert len(drawn.splitlines()) == 5
    assert hold(Ballot(prompts=6, num_steps=2)) == 6  # and one more prompt
    assert (whole / "drawn.jsonl").read_text().startswith(drawn)


def test_other_settings_need_another_folder(hold, tmp_path: Path):
    hold(Ballot(prompts=1, num_steps=2))
    before = (tmp_path / "votes" / "settings.json").read_text()
    assert json.loads(before)["judge"] == "a person"
    with pytest.raises(ValueError, match=r"made with other settings \(num_steps, seed\)"):
        vote(clipped(), lambda: None, tmp_path / "votes", Ballot(prompts=1, num_steps=3, seed=1))
    assert (tmp_path / "votes" / "settings.json").read_text() == before


def test_bad_arguments_are_refused_before_anything_is_drawn(tmp_path: Path, capsys):
    for words, message in (
        (["--images", "7"], "--images 7: a person compares 2 to 6 images"),
        (["--images", "1"], "--images 1: a person compares 2 to 6 images"),
        (["--prompts", "0"], "--prompts 0: use 1 or more"),
    ):
        assert main(["vote", "dpo-shapes", str(tmp_path / "votes"), *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "votes").exists()
