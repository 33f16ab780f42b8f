"""DPM-Solver++(2M) and the DDIM kernel, on a velocity that is known exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlt2i.functional.epsilon import flow_to_vp
from rlt2i.functional.schedules import even_sigmas
from rlt2i.interfaces import RolloutRequest
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.samplers.dpm2 import DPM2
from rlt2i.samplers.kernels import DDIM
from rlt2i.samplers.ode import ODE
from rlt2i.seeds import RolloutNoise
from rlt2i.types import Conditioning
from tests.helpers.build import collect, toy_algorithm, toy_engine, toy_learner
from tests.helpers.published_steps import ddim, transition_to_flow
from tests.helpers.toy import SIDE, ToyPolicy

MEAN, SPREAD = 0.5, 0.3


class Gaussian(ToyPolicy):
    """The exact velocity of clean latents N(MEAN, SPREAD^2), whose ODE maps initial noise z to MEAN + SPREAD z."""

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        variance = SPREAD**2 * (1 - s) ** 2 + s**2
        centred = latents - (1 - s) * MEAN
        clean = MEAN + SPREAD**2 * (1 - s) / variance * centred
        return s / variance * centred - clean


def error(sampler, schedule) -> float:
    policy = Gaussian()
    policy.sigmas = lambda num_steps, image_size: schedule(num_steps)  # type: ignore[method-assign]
    noise = RolloutNoise([0, 1, 2, 3], [4, 5, 6, 7])
    conditioning = Conditioning(tensors={"none": torch.zeros(1, 1)}, rows=torch.zeros(4, dtype=torch.long))
    request = RolloutRequest(noise=noise, captures=frozenset(), image_size=SIDE, group_size=4)
    trajectory = sampler.rollout(policy, conditioning, request)
    exact = MEAN + SPREAD * noise.initial((3, SIDE, SIDE))
    return float((trajectory.clean_latents - exact).abs().mean())


def test_the_second_order_solver_is_more_exact():
    for num_steps in (10, 20, 40, 80):
        assert error(DPM2(num_steps=num_steps), even_sigmas) < 0.4 * error(ODE(num_steps=num_steps), even_sigmas)
    # Halving the length of the steps halves a first-order error and divides a second-order one by up to four.
    assert error(DPM2(num_steps=160), even_sigmas) < 0.4 * error(DPM2(num_steps=80), even_sigmas)


def test_one_step_is_the_ode():
    assert error(DPM2(num_steps=1), even_sigmas) == pytest.approx(error(ODE(num_steps=1), even_sigmas), rel=1e-5)


def test_second_order_rollouts_feed_a_forward_objective():
    algorithm = toy_algorithm(DiffusionNFT(), sampler=DPM2(num_steps=6))
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    assert not experience.trajectory.stochastic.any()
    assert toy_learner(algorithm).learn(experience)["grad_norm"] > 0


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_of_an_epsilon_model_is_the_same_step_in_other_coordinates(eta):
    generator = torch.Generator().manual_seed(0)
    x, epsilon = torch.randn(2, 2, 3, 4, 4, generator=generator)
    sigma, sigma_next = torch.tensor([0.9, 0.4]), torch.tensor([0.7, 0.1])
    velocity = (epsilon - x) / (1 - sigma).view(-1, 1, 1, 1)
    ours = DDIM(eta=eta).transition(x, velocity, sigma, sigma_next, sigma_max=0.9)

    (x_vp, now), (_, then) = flow_to_vp(x, sigma), flow_to_vp(x, sigma_next)
    theirs = transition_to_flow(ddim(x_vp, epsilon, now.flatten(), then.flatten(), eta=eta), then.flatten())
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.std, theirs.std, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.5])
def test_ddim_refuses(eta):
    with pytest.raises(ValueError, match="eta"):
        DDIM(eta=eta)
