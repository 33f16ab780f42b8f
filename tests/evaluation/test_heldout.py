"""The evaluation of a run in training, beyond what the trainer's own tests see."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.evaluation.heldout import Evaluation, Scores, evaluate
from rlt2i.runs.terminal import summary_line
from rlt2i.tasks.base import TaskPrompt
from rlt2i.tasks.shapes.task import ShapesTask
from tests.helpers.toy import QuadrantBrightness, ToyPolicy, ToyTask


def test_held_out_metrics_by_hand():
    prompts = [TaskPrompt(text=text) for text in ("a", "b", "c", "d")]

    def judged(*scores: float, valid: tuple[bool, ...] = (True,) * 4) -> Evaluation:
        said = torch.tensor(scores)
        held_out = Scores(scores=said, valid=torch.tensor(valid), components={"half": said / 2})
        zeros = torch.zeros(4)
        return Evaluation(
            prompts=prompts,
            images=torch.zeros(4, 3, 2, 2, dtype=torch.uint8),
            scores=zeros,
            valid=torch.ones(4, dtype=torch.bool),
            components={},
            heldout={"taste": held_out},
        )

    base = judged(1.0, 2.0, 3.0, 2.0)
    # The last image could not be judged: it leaves the mean, and both sides of the gain.
    now = judged(2.0, 3.0, 4.0, 9.0, valid=(True, True, True, False)).metrics(base)
    assert now["eval/heldout/taste"] == 3.0
    assert now["eval/heldout/taste/half"] == 1.5
    assert now["eval/heldout/taste/invalid"] == 0.25
    assert (now["eval/heldout/taste_gain_low"], now["eval/heldout/taste_gain"]) == (1.0, 1.0)
    assert base.metrics()["eval/heldout/taste_std"] == pytest.approx(0.5**0.5)
    assert not [name for name in base.metrics() if "gain" in name]
    none = judged(*[float("nan")] * 4, valid=(False,) * 4).metrics(base)
    assert {k: v for k, v in none.items() if "heldout" in k} == {"eval/heldout/taste/invalid": 1.0}


def test_the_trained_reward_may_be_watched_under_another_name():
    task, policy = ToyTask(), ToyPolicy()
    found = evaluate(
        policy,
        QuadrantBrightness(),
        task.eval_prompts(3),
        num_steps=2,
        seed=0,
        image_size=8,
        rollout_batch_size=3,
        heldout={"same": QuadrantBrightness()},
    )
    assert torch.equal(found.heldout["same"].scores, found.scores)
    assert found.metrics()["eval/heldout/same"] == found.metrics()["eval/reward"]


def test_what_is_held_out_is_told_apart_from_what_is_trained_on():
    """24 shapes prompts, four of each category: right are the two categories that hold nothing out, and "colors"."""
    task = ShapesTask()
    prompts = task.eval_prompts(24)
    trained = {p.text for p in task.train_prompts(seed=0, start=0, count=2000)}
    assert {p.category for p in prompts if p.trained_on} == {"single_object", "counting"}
    assert all(p.trained_on == (p.text in trained) for p in prompts)

    def judged(*right: str) -> Evaluation:
        scores = torch.tensor([float(p.category in right) for p in prompts])
        images = torch.zeros(24, 3, 2, 2, dtype=torch.uint8)
        return Evaluation(
            prompts=prompts,
            images=images,
            scores=scores,
            valid=torch.ones(24, dtype=torch.bool),
            components={"strict": scores},
        )

    base, now = judged("single_object"), judged("single_object", "counting", "colors")
    found = now.metrics(base)
    assert found["eval/strict"] == 0.5
    assert found["eval/unseen/strict"] == 0.25
    assert found["eval/seen/strict"] == 1.0
    assert found["eval/strict_gain"] == pytest.approx(1 / 3)
    assert found["eval/unseen/strict_gain"] == 0.25
    assert found["eval/seen/strict_gain"] == 0.5
    assert (found["eval/unseen/images"], found["eval/seen/images"]) == (16, 8)
    # No prompt is right in one image and wrong in another: nothing varies, however much the prompts differ.
    assert found["eval/strict_low"] == found["eval/strict_high"] == 0.5
    assert "held-out  0.250" in summary_line(1, found)
    unseen = attrs.evolve(now, notes=[p.text for p in prompts]).unseen()
    assert len(unseen.prompts) == len(unseen.images) == len(unseen.notes) == 16
    assert not any(p.trained_on for p in unseen.prompts)
    assert float(unseen.scores.mean()) == float(unseen.components["strict"].mean()) == 0.25
    assert unseen.unseen() is unseen
    # A category of prompts whose images could not be judged leaves the others alone.
    lost = attrs.evolve(now, valid=torch.tensor([p.category != "colors" for p in prompts])).metrics(base)
    assert lost["eval/unseen/strict"] == 0.0
