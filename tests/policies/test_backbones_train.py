"""Every backbone learns under STAR with the clipped surrogate, NFT and online DPO, on tiny random weights."""

from __future__ import annotations

import pytest
import torch

from rlt2i.algorithm import Algorithm
from rlt2i.captures import Direction
from rlt2i.config import load_object
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.text_attention import TextAttention
from rlt2i.engine import Engine
from rlt2i.learner import Learner
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.online_dpo import OnlineDPO
from rlt2i.parameter_sets import ParameterSets
from rlt2i.recipes.parts import PARTS
from rlt2i.rehearsal.replacing import small_policy
from rlt2i.rehearsal.stand_ins import StandInReward
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from rlt2i.types import Prompts
from tests.helpers.backbones import marked

BACKBONES = {name: load_object(reference) for name, reference in PARTS["PolicySpec"].items()}
PROMPTS = Prompts.of(("a red cat", "two boxes on a sign"), group_size=3)


@pytest.fixture(scope="module", params=marked(BACKBONES))
def backbone(request, tmp_path_factory):
    """The size of its images, and the loaded tiny policy with its starting weights."""
    spec = BACKBONES[request.param](lora_rank=2, guidance_scale=2.0)
    spec, size = small_policy(spec, tmp_path_factory.mktemp("tiny"), 32, compile_blocks=False, said=[])
    policy = spec.load()
    return size, policy, {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}


def credit(direction: Direction) -> Product:
    return Product(
        advantage=GroupRelative(), allocations=(TextAttention(direction=direction, blocks="middle", doubt=0.0),)
    )


OBJECTIVES = {
    "clipped": (ClippedSurrogate(ratio="location"), SDE(num_steps=3)),
    "nft": (DiffusionNFT(sigmas=SigmaDraws(count=2)), ODE(num_steps=2)),
    "dpo": (OnlineDPO(sigmas=SigmaDraws(count=1)), ODE(num_steps=2)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_iterations_of_star(backbone, name):
    size, policy, start = backbone
    parameters = policy.trainable_parameters()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(start[key])
    objective, sampler = OBJECTIVES[name]
    algorithm = Algorithm(
        policy=policy, sampler=sampler, reward=StandInReward(of="test"), objective=objective,
        credit=credit("image_to_text"),
    )  # fmt: skip
    engine = Engine(algorithm=algorithm, image_size=size, rollout_batch_size=6, seed=0)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    learner = Learner(
        policy=policy, objective=objective, reward=algorithm.reward, optimizer=optimizer,
        sets=ParameterSets(parameters), micro_batch_size=4,
    )  # fmt: skip
    for iteration in range(2):
        batch = engine.collect(PROMPTS, iteration=iteration)
        weight = batch.experience.credit.weight
        assert weight.shape[-2:] == policy.token_grid(size)
        assert weight.std() > 0
        metrics = learner.learn(batch.experience)
        assert metrics["grad_norm"] > 0
        if name == "clipped":
            assert metrics["ratio/abs_minus_one_max"] == 0.0
    moved = {key for key, parameter in parameters.items() if not torch.equal(parameter, start[key])}
    assert len(moved) > 0.9 * len(parameters)
