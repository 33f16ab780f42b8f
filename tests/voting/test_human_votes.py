"""Votes as a reward: scores by hand, what is invalid and why, a run that learns from them, a run that was killed."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import attrs
import pytest
import torch

from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.objectives.online_dpo import OnlineDPO
from rlt2i.recipes import build_part, load_recipe
from rlt2i.rehearsal.replacing import make_small
from rlt2i.rehearsal.stand_ins import StandInReward
from rlt2i.rewards.jpeg import JPEGCompressibility
from rlt2i.rewards.validity import score_safely
from rlt2i.runs.metrics import read_metrics
from rlt2i.samplers.ode import ODE
from rlt2i.training.start import train
from rlt2i.training.trainer import RunStopped
from rlt2i.voting.booth import Booth
from rlt2i.voting.reward import HumanVotes
from tests.helpers.servers import remote, serving
from tests.helpers.toy import QuadrantBrightness
from tests.helpers.toy_recipe import clipped
from tests.voting.conftest import pictures

pytest.importorskip("uvicorn")


def of_groups(*sizes: int) -> RewardBatch:
    """Groups of random pictures; picture i is the brighter the larger i."""
    count = sum(sizes)
    images = pictures(count) // 4 + (torch.arange(count) * 10).view(-1, 1, 1, 1).to(torch.uint8)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return RewardBatch(images=images, prompts=[f"prompt {g}" for g in groups], metadata=[{}] * count, groups=groups)


@pytest.fixture
def reward(tmp_path: Path):
    made = HumanVotes(folder=str(tmp_path / "votes"), undo_s=0.0, patience_s=20.0)
    yield made
    made.close()


def brightest(booth: Booth, batch: RewardBatch):
    """A person who likes bright pictures."""
    light: dict[str, float] = {}
    for image in batch.images:
        (name,) = booth.folder.keep(image[None], "any", {}).images
        light[name] = float(image.float().mean())
    return lambda prompt, left, right: "left" if light[left] > light[right] else "right"


def test_groups_of_two_three_and_four_by_hand(reward, person):
    batch = of_groups(2, 3, 4)
    person(reward._booth(), brightest(reward._booth(), batch))
    output = score_safely(reward, batch)
    assert output.valid.all()
    torch.testing.assert_close(output.scores, torch.tensor([0, 1, 0, 0.5, 1, 0, 1 / 3, 2 / 3, 1]))
    assert output.info[8] == {"won": 3, "lost": 0, "tied": 0}
    assert 1 + 2 + 3 <= len(reward._booth().folder.votes) <= 1 + 3 + 6  # what follows is not asked


def test_ties_and_skips(reward, person):
    batch = of_groups(2, 2)
    person(reward._booth(), lambda prompt, left, right: "tie" if prompt == "prompt 0" else "skip")
    output = score_safely(reward, batch)
    assert output.valid.tolist() == [True, True, False, False]
    assert output.scores[:2].tolist() == [0.5, 0.5]
    assert output.scores[2:].isnan().all()
    assert output.info[3] == {"error": "every pair of this image was skipped"}


def test_nobody_votes(tmp_path: Path):
    reward = HumanVotes(folder=str(tmp_path / "votes"), patience_s=0.1)
    output = score_safely(reward, of_groups(2))
    assert not output.valid.any()
    assert output.info[0] == {"error": "nobody voted for 0.1 s"}
    assert reward._booth().state()["question"] is None  # it is not asked any more
    reward.close()


def first_question(booth: Booth) -> str:
    """The name of the question asked, once there is one."""
    while (question := booth.state()["question"]) is None:
        time.sleep(0.002)
    return question["name"]


def test_somebody_leaves_in_the_middle(tmp_path: Path):
    reward = HumanVotes(folder=str(tmp_path / "votes"), patience_s=1.0, undo_s=0.0)
    batch, booth = of_groups(2, 2), reward._booth()
    threading.Thread(target=lambda: booth.vote(first_question(booth), "tie"), daemon=True).start()
    output = score_safely(reward, batch)
    assert output.valid.tolist() == [True, True, False, False]
    reward.close()


def test_the_last_vote_can_be_taken_back_for_a_while(tmp_path: Path):
    reward = HumanVotes(folder=str(tmp_path / "votes"), patience_s=20.0, undo_s=1.0)
    booth, answers = reward._booth(), []
    thread = threading.Thread(target=lambda: answers.append(reward.score(of_groups(2))), daemon=True)
    thread.start()
    name = first_question(booth)
    assert booth.vote(name, "left")
    assert booth.undo()
    assert booth.vote(name, "tie")
    thread.join(10)
    assert answers[0].scores.tolist() == [0.5, 0.5]
    assert not booth.undo()  # it is scored
    reward.close()


def test_images_that_come_alone_and_groups_that_are_too_large(tmp_path: Path):
    reward = HumanVotes(folder=str(tmp_path / "votes"))
    output = score_safely(reward, of_groups(1, 7))
    assert not output.valid.any()
    assert "set train.eval_prompts=0, or give HumanVotes(alone=REWARD)" in output.info[0]["error"]
    assert "a group of 7 images: a person compares at most 6" in output.info[1]["error"]
    judged = attrs.evolve(reward, alone=JPEGCompressibility())
    batch = of_groups(1, 1)
    torch.testing.assert_close(score_safely(judged, batch).scores, JPEGCompressibility().score(batch).scores)
    assert not (tmp_path / "votes").exists()  # nobody was asked


def test_votes_are_asked_once_across_processes(tmp_path: Path, person):
    first = HumanVotes(folder=str(tmp_path / "votes"), undo_s=0.0)
    batch = of_groups(3)
    person(first._booth(), brightest(first._booth(), batch))
    scores = first.score(batch).scores
    first.close()
    again = HumanVotes(folder=str(tmp_path / "votes"), patience_s=0.1)  # nobody is there any more
    torch.testing.assert_close(again.score(batch).scores, scores)
    again.close()


def test_votes_behind_a_server(reward, person):
    batch = of_groups(2, 3)
    person(reward._booth(), brightest(reward._booth(), batch))
    with serving(reward) as url:
        output = remote(url, chunk=4, timeout_s=20.0).score(batch)
    torch.testing.assert_close(output.scores, torch.tensor([0, 1, 0, 0.5, 1]))


# ------------------------------------------------------------------------------------------------------------- in a run


def voted(folder: Path, **train_fields: object):
    """The toy recipe under online DPO and votes, groups of two."""
    recipe = clipped(
        group_size=2, optimizer_steps_per_iteration=1, ema_decay=None, reference=False, iterations=2, **train_fields
    )
    return attrs.evolve(
        recipe,
        sampler=ODE(num_steps=4),
        reward=HumanVotes(folder=str(folder), alone=QuadrantBrightness(), undo_s=0.0, patience_s=20.0),
        credit=Product(advantage=GroupRelative()),
        objective=OnlineDPO(beta=10.0),
    )


def test_a_run_learns_from_votes_and_asks_no_question_twice(tmp_path: Path, person, monkeypatch, capfd):
    asked: list[tuple[str, str]] = []

    def decide(prompt: str, left: str, right: str) -> str:
        asked.append((left, right))
        return "left" if left < right else "right"

    make = HumanVotes._booth
    monkeypatch.setattr(HumanVotes, "_booth", lambda self: (person(booth := make(self), decide), booth)[1])
    train(voted(tmp_path / "votes", eval_every=0), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [row["rewards/invalid"] for row in rows] == [0, 0]
    assert all(row["reward/mean"] == 0.5 for row in rows)  # one of two wins
    assert all(row["loss/dpo"] > 0 for row in rows)
    assert rows[0]["grad_norm"] > 0
    assert "vote on this machine at http://127.0.0.1:" in capfd.readouterr().err
    votes = len((tmp_path / "votes" / "votes.jsonl").read_text().splitlines())
    assert votes == len(asked) == 2 * 4  # iterations x prompts
    train(voted(tmp_path / "votes", eval_every=0), tmp_path / "again")  # as after a kill: the same images
    assert len(asked) == votes


def test_a_run_that_nobody_votes_in_stops_and_says_why(tmp_path: Path):
    recipe = voted(tmp_path / "votes", eval_prompts=0)
    recipe = attrs.evolve(recipe, reward=attrs.evolve(recipe.reward, patience_s=0.2))
    with pytest.raises(RunStopped, match=r"100% of the rewards are invalid.*8 x nobody voted for 0.2 s"):
        train(recipe, tmp_path / "run")


def test_nobody_has_to_vote_in_a_rehearsal(tmp_path: Path):
    small = make_small(load_recipe("dpo-votes-shapes"), tmp_path)
    assert isinstance(small.recipe.reward, StandInReward)
    assert small.recipe.reward.scope == "group"
    assert "reward HumanVotes -> a stand-in that reads brightness" in small.replaced


def test_the_reward_of_a_recipe_file():
    built = build_part(HumanVotes, {"type": "HumanVotes", "alone": "JPEGCompressibility", "patience_s": 60})
    assert (built.scope, built.span) == ("group", None)
    assert HumanVotes().span == (0.0, 1.0)
    assert HumanVotes(folder="a").fingerprint() == HumanVotes(folder="b").fingerprint()
    assert isinstance(HumanVotes().score(of_groups(1)), RewardOutput)
    with pytest.raises(ValueError, match="patience_s"):
        HumanVotes(patience_s=0)
