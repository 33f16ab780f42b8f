"""Images that are no squares: in configuration, in rollouts of several sizes, in maps and in updates."""

from __future__ import annotations

import itertools

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
from rlt2i.recipes.train_config import TrainConfig, derive_batch
from rlt2i.samplers.sde import SDE
from rlt2i.training.group_sizes import groups_by_size
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


def sized_config(prompts, sizes, **options):
    return TrainConfig(**{**TRAIN, "prompts_per_iteration": prompts, "image_size": 8, "sizes": sizes, **options})


def test_every_size_gets_equally_many_groups_and_the_seed_draws_which():
    config = sized_config(12, [8, [8, 16], [16, 8]])
    dealt = [groups_by_size(config, iteration=iteration) for iteration in range(20)]
    for groups in dealt:
        assert {size: len(positions) for size, positions in groups.items()} == {8: 4, (8, 16): 4, (16, 8): 4}
        assert sorted(itertools.chain(*groups.values())) == list(range(12))
    assert len({str(groups) for groups in dealt}) == 20
    assert dealt == [groups_by_size(config, iteration=iteration) for iteration in range(20)]
    assert dealt[0] != groups_by_size(attrs.evolve(config, seed=1), iteration=0)
    twice = groups_by_size(attrs.evolve(config, sizes=(8, 8, (8, 16))), iteration=0)
    assert {size: len(positions) for size, positions in twice.items()} == {8: 8, (8, 16): 4}
    assert groups_by_size(attrs.evolve(config, sizes=()), iteration=3) == {8: list(range(12))}


def test_groups_that_do_not_go_into_the_sizes_are_one_more_or_less_and_no_size_is_left_behind():
    config = sized_config(5, [8, [8, 16]])
    counts = [len(groups_by_size(config, iteration=iteration)[8]) for iteration in range(40)]
    assert set(counts) == {2, 3}
    few = sized_config(1, [8, [8, 16]])
    assert {next(iter(groups_by_size(few, iteration=iteration))) for iteration in range(20)} == {8, (8, 16)}


def test_sizes_that_processes_could_not_share_are_refused_with_numbers_that_work():
    plan = {"num_steps": 2, "trained_steps": 2}
    derive_batch(sized_config(5, [8, [8, 16]]), world_size=1, **plan)
    derive_batch(sized_config(8, [8, [8, 16]]), world_size=4, **plan)
    derive_batch(sized_config(8, [8, 8, 8, [8, 16]]), world_size=2, **plan)
    with pytest.raises(ValueError, match=r"=12 cannot be dealt to 2 sizes x 4 processes x 1 .*multiple of 8.*=8 or 16"):
        derive_batch(sized_config(12, [8, [8, 16]]), world_size=4, **plan)
    with pytest.raises(ValueError, match=r"=4 cannot.*multiple of 6.*=6"):
        derive_batch(sized_config(4, [8, 16, [8, 16]], optimizer_steps_per_iteration=2), world_size=1, **plan)


def sd3_algorithm(folder):
    credit = Product(advantage=GroupRelative(), allocations=(TextAttention(blocks="all", doubt=0.0),))
    return Algorithm(
        policy=SD3(path=str(folder), lora_rank=2), sampler=SDE(num_steps=3), reward=QuadrantBrightness(),
        credit=credit, objective=ClippedSurrogate(ratio="token"),
    ).load()  # fmt: skip


def new_learner(algorithm):
    parameters = algorithm.policy.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return Learner(
        policy=algorithm.policy, objective=algorithm.objective, reward=algorithm.reward, optimizer=optimizer,
        sets=ParameterSets(parameters), micro_batch_size=4,
    )  # fmt: skip


def test_batches_of_several_sizes_are_rolled_out_credited_and_learned_from_in_one_step(clip_pipeline):
    algorithm = sd3_algorithm(clip_pipeline)
    engine = Engine(algorithm=algorithm, image_size=32, rollout_batch_size=2, seed=0)
    prompts = attrs.evolve(Prompts.of(["a red cat and a dog"], group_size=4), core=(("cat",),))
    batches = []
    for draw, size in enumerate((32, (16, 48))):
        drawn = attrs.evolve(prompts, draws=(draw,))
        batches.append(engine.collect(drawn, iteration=0, image_size=size).experience)
        h, w = (side // 4 for side in height_and_width(size))
        assert batches[-1].trajectory.latents.shape[-2:] == (2 * h, 2 * w)
        assert batches[-1].credit.grid == batches[-1].token_grid == (h, w)
    learner = new_learner(algorithm)
    metrics = learner.learn(batches)
    assert learner.optimizer_step == 1
    assert metrics["ratio/abs_minus_one_max"] == 0.0
    assert metrics["grad_norm"] > 0
    assert metrics["informative"] == 1.0


def test_two_batches_give_the_step_of_one(clip_pipeline):
    """Their losses are shares of one mean."""
    steps = []
    for apart in (False, True):
        algorithm = sd3_algorithm(clip_pipeline)
        engine = Engine(algorithm=algorithm, image_size=32, rollout_batch_size=8, seed=0)
        whole = engine.collect(Prompts.of(["a red cat", "a dog"], group_size=3), iteration=0).experience
        halves = [whole.take(rows) for rows in (torch.arange(3), torch.arange(3, 6))]
        metrics = new_learner(algorithm).learn(halves if apart else whole)
        steps.append(metrics["grad_norm"])
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)
