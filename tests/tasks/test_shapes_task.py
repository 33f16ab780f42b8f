"""The shapes world as a task and a reward."""

from __future__ import annotations

import json

import pytest
import torch

from rlt2i.interfaces import RewardBatch, to_uint8
from rlt2i.tasks.base import as_prompts, check_metadata
from rlt2i.tasks.shapes.prompts import ShapesPrompt, split_prompts
from rlt2i.tasks.shapes.render import render, sample_scenes
from rlt2i.tasks.shapes.reward import ShapesReward
from rlt2i.tasks.shapes.task import ShapesTask
from tests.helpers.toy import ToyTask


def test_training_never_draws_a_held_out_combination():
    task = ShapesTask()
    train, held_out = split_prompts()
    shared = {p.text for p in train} & {p.text for p in held_out}
    drawn = {p.text for p in task.train_prompts(seed=0, start=0, count=600)}
    judged = {p.text for p in task.eval_prompts(480) if p.category not in ("single_object", "counting")}
    assert drawn.isdisjoint(judged - shared)
    assert len(drawn) > 60


def test_the_stream_is_a_function_of_seed_and_position():
    task = ShapesTask()
    whole = task.train_prompts(seed=3, start=0, count=20)
    assert task.train_prompts(seed=3, start=12, count=8) == whole[12:]
    assert task.train_prompts(seed=4, start=0, count=20) != whole
    assert [p.category for p in whole[:6]] == sorted(
        {p.category for p in whole[:6]}, key=[p.category for p in whole].index
    )


def test_eval_prompts_are_balanced_or_refused():
    prompts = ShapesTask().eval_prompts(48)
    assert [sum(p.category == c for p in prompts) for c in dict.fromkeys(p.category for p in prompts)] == [8] * 6
    with pytest.raises(ValueError, match="Use 48 or 54"):
        ShapesTask().eval_prompts(50)


def scenes(count: int) -> tuple[torch.Tensor, list[ShapesPrompt]]:
    generator = torch.Generator().manual_seed(0)
    prompts = [ShapesPrompt.from_metadata(p.metadata) for p in ShapesTask().eval_prompts(count)]
    return to_uint8(render(sample_scenes(prompts, generator), generator)), prompts


def test_reward_of_right_and_wrong_images():
    images, prompts = scenes(48)
    metadata = [json.loads(json.dumps(p.metadata())) for p in prompts]
    right = ShapesReward().score(RewardBatch(images=images, prompts=[p.text for p in prompts], metadata=metadata))
    assert right.scores.mean() > 0.97
    assert (right.components["objects"] == right.components["objects_asked"]).float().mean() > 0.97
    blank = ShapesReward().score(
        RewardBatch(images=torch.full_like(images, 200), prompts=[p.text for p in prompts], metadata=metadata)
    )
    assert blank.scores.max() == 0
    assert blank.valid.all()  # a wrong image is wrong, not a failure


def test_maps_and_regions_come_only_when_asked_for():
    images, prompts = scenes(12)
    batch = RewardBatch(images=images, prompts=[p.text for p in prompts], metadata=[p.metadata() for p in prompts])
    plain = ShapesReward().score(batch)
    assert plain.maps is None
    assert plain.regions is None
    full = ShapesReward().score(batch, frozenset({"maps", "regions"}))
    assert full.maps.shape == (12, 32, 32)
    for prompt, regions, map_ in zip(prompts, full.regions, full.maps, strict=True):
        assert len(regions) == prompt.count
        assert all(r.credit == 1.0 for r in regions)
        assert map_.sum() == sum(int(r.mask.sum()) for r in regions)
    assert [seen["seen"] for seen in plain.info] == [[r.label for r in regions] for regions in full.regions]


def test_missing_metadata_is_refused_before_anything_runs():
    check_metadata(ShapesTask(), ShapesReward())
    with pytest.raises(ValueError, match="needs the metadata"):
        check_metadata(ToyTask(), ShapesReward())


def test_a_prompt_drawn_twice_keeps_two_identities():
    prompts = as_prompts(ShapesTask().train_prompts(seed=0, start=0, count=2), group_size=3, start=10)
    assert prompts.draws == (10, 11)
    assert prompts.num_rollouts == 6
