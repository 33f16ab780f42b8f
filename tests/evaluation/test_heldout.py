"""The evaluation of a run in training, beyond what the trainer's own tests see."""

from __future__ import annotations

import pytest
import torch

from rlt2i.evaluation.heldout import Evaluation, Scores, evaluate
from rlt2i.tasks.base import TaskPrompt
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
