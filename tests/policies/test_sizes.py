"""Images that are no squares: in configuration, in rollouts of several sizes, in maps and in updates."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.algorithm import Algorithm
from rlt2i.config import ConfigError, build, to_mapping
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.text_attention import TextAttention
from rlt2i.engine import Engine
from rlt2i.learner import Learner
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.parameter_sets import ParameterSets
from rlt2i.policies.sd3 import SD3
from rlt2i.recipes.train_config import TrainConfig
from rlt2i.samplers.sde import SDE
from rlt2i.types import Prompts, height_and_width
from tests.helpers.toy import QuadrantBrightness

TRAIN = {
    "iterations": 1, "prompts_per_iteration": 2, "group_size": 2, "rollout_batch_size": 4, "micro_batch_size": 4,
    "learning_rate": 1e-3,
}  # fmt: skip


def test_one_number_is_a_square_and_two_are_height_and_width():
    assert height_and_width(512) == (512, 512)
    config = build(TrainConfig, {**TRAIN, "image_size": [512, 512], "sizes": [512, [512, 768], [768, 768]]})
    assert config.image_size == 512
    assert config.sizes == (512, (512, 768), 768)
    mapping = to_mapping(config, typed=False)
    assert (mapping["image_size"], mapping["sizes"]) == (512, [512, [512, 768], 768])
    assert build(TrainConfig, mapping) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 0}, "image_size: image_size=0: a side of an image has at least 1 pixel"),
        ({"image_size": [512, -1]}, "a side of an image"),
        ({"image_size": [512]}, "image_size: got .*expected int or"),
        ({"image_size": 512.0}, "image_size: got 512.0"),
        ({"image_size": 8, "sizes": [[8, 0]]}, "sizes: .*a side of an image"),
    ],
)
def test_sizes_that_are_none_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, {**TRAIN, **change})


def test_a_size_is_refused_before_any_weight_is_read(clip_pipeline, monkeypatch):
    spec = SD3(path=str(clip_pipeline))
    monkeypatch.setattr("rlt2i.policies.pretrained.policy.read_pipeline", lambda spec: pytest.fail("weights were read"))
    spec.check_image_size((32, 64))
    with pytest.raises(ValueError, match=r"size=\(30, 64\).*multiple of 4, at most 64.*nearest that works is 32 x 64"):
        spec.check_image_size((30, 64))
    with pytest.raises(ValueError, match="nearest that works is 64 x 64"):
        spec.check_image_size(128)


def test_iterations_of_several_sizes_are_rolled_out_credited_and_learned_from(clip_pipeline):
    credit = Product(advantage=GroupRelative(), allocations=(TextAttention(blocks="all", doubt=0.0),))
    algorithm = Algorithm(
        policy=SD3(path=str(clip_pipeline), lora_rank=2), sampler=SDE(num_steps=3), reward=QuadrantBrightness(),
        credit=credit, objective=ClippedSurrogate(ratio="token"),
    ).load()  # fmt: skip
    engine = Engine(algorithm=algorithm, image_size=32, sizes=(32, (16, 48)), rollout_batch_size=2, seed=0)
    drawn = [engine.size_at(iteration) for iteration in range(20)]
    assert set(drawn) == {32, (16, 48)}
    assert drawn == [attrs.evolve(engine, rank=1).size_at(iteration) for iteration in range(20)]
    parameters = algorithm.policy.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    learner = Learner(
        policy=algorithm.policy, objective=algorithm.objective, reward=algorithm.reward, optimizer=optimizer,
        sets=ParameterSets(parameters), micro_batch_size=4,
    )  # fmt: skip
    prompts = attrs.evolve(Prompts.of(["a red cat and a dog"], group_size=4), core=(("cat",),))
    for size in (32, (16, 48)):
        experience = engine.collect(prompts, iteration=drawn.index(size)).experience
        h, w = (side // 4 for side in height_and_width(size))
        assert experience.trajectory.latents.shape[-2:] == (2 * h, 2 * w)
        assert experience.credit.grid == experience.token_grid == (h, w)
        metrics = learner.learn(experience)
        assert metrics["ratio/abs_minus_one_max"] == 0.0
        assert metrics["grad_norm"] > 0
