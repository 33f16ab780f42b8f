"""The negative prompt's velocities of a rollout are not computed again by the first optimizer step on it."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.algorithm import Algorithm
from rlt2i.captures import NEGATIVE
from rlt2i.engine import Engine
from rlt2i.interfaces import Objective
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.dppo import FlowDPPO
from rlt2i.objectives.grpo_guard import GRPOGuard
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.norm_guard import NormGuard
from rlt2i.objectives.penalty import KLPenalty
from rlt2i.objectives.reinforce import Reinforce
from rlt2i.policies.sd3 import SD3
from rlt2i.samplers.sde import SDE
from rlt2i.types import Prompts
from tests.helpers.build import UNIFORM, gradients, toy_learner
from tests.helpers.toy import QuadrantBrightness

PROMPTS = Prompts.of(("a red cat", "two blue dogs"), group_size=2)
STEPS = 2


@pytest.fixture(scope="module")
def policy(clip_pipeline):
    """Moved off its start, where half of an adapter is zero, so that the base is another network."""
    loaded = SD3(path=str(clip_pipeline), lora_rank=2, guidance_scale=3.0).load()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.trainable_parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    return loaded


def learning(policy, objective: Objective, *, reuse: bool, optimizer_steps: int = 1):
    algorithm = Algorithm(
        policy=attrs.evolve(policy, reuse_negative=reuse),
        sampler=SDE(num_steps=STEPS + 1, window=(0, STEPS)),
        reward=QuadrantBrightness(),
        credit=UNIFORM,
        objective=objective,
    )
    engine = Engine(algorithm=algorithm, image_size=32, rollout_batch_size=4, seed=1)
    prompts = attrs.evolve(PROMPTS, metadata=({"quadrant": 0}, {"quadrant": 1}))
    learner = toy_learner(algorithm, micro_batch_size=4, optimizer_steps_per_iteration=optimizer_steps)
    return learner, engine.collect(prompts, iteration=0).experience


def passes(policy, work) -> int:
    """How often the network runs."""
    count = [0]
    hook = policy.policy.network.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    work()
    hook.remove()
    return count[0]


@pytest.mark.parametrize(
    ("objective", "others"),
    [
        (ClippedSurrogate(), 0),
        (Reinforce(), 0),
        (GRPOGuard(), 0),
        (FlowDPPO(), 0),
        (ClippedSurrogate(kl_penalty=KLPenalty(weight=0.1)), 2),
        (NormGuard(objective=ClippedSurrogate()), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Objective) else str(value),
)
def test_the_first_step_saves_a_pass_and_has_the_same_gradient(policy, objective, others):
    """`others`: passes of the reference, whose negative prompt is its own."""
    learner, experience = learning(policy, objective, reuse=False)
    reused, recorded = learning(policy, objective, reuse=True)
    assert NEGATIVE not in experience.trajectory.captures
    assert recorded.trajectory.captures[NEGATIVE].shape == recorded.trajectory.latents[:, 1:].shape
    assert torch.equal(recorded.trajectory.latents, experience.trajectory.latents)
    expected, again = {}, {}
    plain = passes(policy, lambda: expected.update(gradients(learner, experience)))
    saved = passes(policy, lambda: again.update(gradients(reused, recorded)))
    assert (plain, saved) == (STEPS * (2 + others), STEPS * (1 + others))
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(again[name], gradient), name


def test_later_steps_have_other_weights_and_compute_it(policy):
    before = {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}
    counts, weights = [], []
    for reuse in (False, True):
        learner, experience = learning(policy, ClippedSurrogate(), reuse=reuse, optimizer_steps=2)
        counts.append(passes(policy, lambda learner=learner, experience=experience: learner.learn(experience)))
        weights.append({name: p.detach().clone() for name, p in policy.trainable_parameters().items()})
        with torch.no_grad():
            for name, parameter in policy.trainable_parameters().items():
                parameter.copy_(before[name])
    assert counts[0] - counts[1] == STEPS / 2  # two rollouts of two steps fill a micro-batch of the first step
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in before)


def test_nobody_records_it_for_an_objective_that_noises_images_anew(policy):
    _, experience = learning(policy, DiffusionNFT(), reuse=True)
    assert NEGATIVE not in experience.trajectory.captures
