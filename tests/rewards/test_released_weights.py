"""Rewards on the weights that people use. They need the network; until somebody has run them, the docs say so."""

from __future__ import annotations

import pytest
import torch

from rlt2i.interfaces import RewardBatch
from rlt2i.rewards.aesthetic import Aesthetic
from rlt2i.rewards.clipscore import CLIPScore
from rlt2i.rewards.geneval import GenEvalReward
from rlt2i.rewards.hpsv2 import HPSv2
from rlt2i.rewards.imagereward import ImageReward
from rlt2i.rewards.pickscore import PickScore

pytestmark = pytest.mark.hub


def red_and_blue() -> torch.Tensor:
    """A flat red and a flat blue image of 512 pixels."""
    images = torch.zeros(2, 3, 512, 512, dtype=torch.uint8)
    images[0, 0], images[1, 2] = 220, 220
    return images


@pytest.mark.parametrize("reward", [PickScore(), CLIPScore(), HPSv2(), ImageReward()], ids=lambda r: type(r).__name__)
def test_the_prompt_decides_which_image_is_better(reward):
    for better, prompt in enumerate(("a plain red background", "a plain blue background")):
        batch = RewardBatch(images=red_and_blue(), prompts=[prompt] * 2, metadata=[{}] * 2)
        scores = reward.score(batch).scores
        assert scores[better] > scores[1 - better], prompt


def test_raw_scales():
    batch = RewardBatch(images=red_and_blue(), prompts=["a plain red background"] * 2, metadata=[{}] * 2)
    assert 10 < PickScore().score(batch).scores[0] < 30
    assert 0.1 < HPSv2().score(batch).scores[0] < 0.4
    assert 0 < Aesthetic().score(batch).scores[0] < 10


def test_the_official_detector_sees_nothing_in_flat_paint():
    metadata = {"tag": "single_object", "include": [{"class": "cow", "count": 1}]}
    batch = RewardBatch(images=red_and_blue(), prompts=["a photo of a cow"] * 2, metadata=[metadata] * 2)
    output = GenEvalReward(rule="official").score(batch)
    assert output.valid.all()
    assert output.scores.tolist() == [0.0, 0.0]
