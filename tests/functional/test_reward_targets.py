"""Targets that a reward has moved: by hand, and what they aim at."""

from __future__ import annotations

import pytest
import torch

from rlt2i.functional.matching import nft_loss_map
from rlt2i.functional.reward_targets import (
    RewardTargets,
    gradient_targets,
    reinforce_adjoint_target,
    self_distillation_loss_map,
)
from rlt2i.functional.transitions import flow_ddim, precise

one = lambda *values: torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)


def test_reinforce_adjoint_target_by_hand():
    # Residual (eps - x0) - v = (3 - 1) - .5 = 1.5; v_ref 1, A 2: 1 + 3. A = 0 leaves the reference.
    v, reference, x0, noise = one(0.5).requires_grad_(), one(1.0), one(1.0), one(3.0)
    target = reinforce_adjoint_target(v, reference, x0, noise, 2.0)
    assert target.item() == 4.0
    assert not target.requires_grad
    assert reinforce_adjoint_target(v, reference, x0, noise, torch.zeros(1)).item() == 1.0


def test_the_mean_target_is_the_first_order_of_the_tilted_velocity():
    # Data -1 and 1, rewards 0 and 1, any state x at sigma = .6: the velocity is the posterior mean of eps - x0.
    x, sigma, data, reward = 0.3, 0.6, torch.tensor([-1.0, 1.0]).double(), torch.tensor([0.0, 1.0]).double()
    noise = (x - (1 - sigma) * data) / sigma
    target = noise - data

    def posterior(tilt: float) -> torch.Tensor:
        return torch.softmax(-(noise**2) / 2 + tilt * reward, dim=0)

    reference = (posterior(0.0) * target).sum()
    v = reference.expand(2, 1, 1, 1)
    moved = reinforce_adjoint_target(v, v, data.view(2, 1, 1, 1), noise.view(2, 1, 1, 1), reward)
    step = 1e-4
    tilted = (posterior(step) * target).sum()
    slope = (tilted - reference) / step
    assert float((posterior(0.0) * moved.flatten()).sum() - reference) == pytest.approx(float(slope), rel=1e-3)


def test_gradient_targets_by_hand():
    # |y0| = 5, a tenth of it is .5; the gradient (0, 8) has direction (0, 1). No gradient, no step.
    better, worse = gradient_targets(one(3.0, 4.0), one(0.0, 8.0), radius=0.1)
    torch.testing.assert_close(better, one(3.0, 4.5))
    torch.testing.assert_close(worse, one(3.0, 3.5))
    still = gradient_targets(one(3.0, 4.0), one(0.0, 0.0), radius=0.1)
    assert torch.equal(still.better, one(3.0, 4.0))
    assert torch.equal(still.worse, one(3.0, 4.0))


def test_self_distillation_loss_by_hand():
    # x 2, sigma .5, v_old 1: y0 = 1.5. Targets 2 and 1. At v = v_old both residuals are .5, whatever the label:
    # squared .25 over their size .5 is .5, times the clip 5. Both branches pull the clean prediction up, hence v down.
    v = one(1.0).requires_grad_()
    targets = RewardTargets(one(2.0), one(1.0))
    for label in (0.0, 0.25, 1.0):
        loss = self_distillation_loss_map(v, one(1.0), one(2.0), 0.5, targets, label, beta=1.0, clip=5.0)
        torch.testing.assert_close(loss.detach().flatten(), torch.tensor([2.5]).double())
        (gradient,) = torch.autograd.grad(loss.sum(), v)
        torch.testing.assert_close(gradient.flatten(), torch.tensor([5.0]).double())  # 5 x 2 (-.5) (-.5) / .5


def test_with_the_finished_image_as_both_targets_it_is_diffusion_nft():
    draw = torch.Generator().manual_seed(0)
    v, old, x0, noise = (torch.randn(3, 2, 4, 4, generator=draw, dtype=torch.float64) for _ in range(4))
    label = torch.rand(3, generator=draw, dtype=torch.float64)
    state = 0.6 * x0 + 0.4 * noise
    ours = self_distillation_loss_map(v, old, state, 0.4, RewardTargets(x0, x0), label, beta=0.5, clip=5.0)
    nft = nft_loss_map(v, old, x0, noise, 0.4, label, beta=0.5, clip=5.0)
    torch.testing.assert_close(ours, nft * 0.5)  # DiffusionNFT divides its loss by beta


def test_precise_step_by_hand():
    # From .5 to .25 what is left is (.25 / .75) / (.5 / .5) = 1/3: std = .25 sqrt(1 - 1/3) at a = 1.
    x, v = one(1.0), one(0.4)  # x0_hat = .8, eps_hat = 1.2
    step = precise(x, v, 0.5, 0.25, noise_level=1.0)
    std = 0.25 * (2 / 3) ** 0.5
    torch.testing.assert_close(step.std.flatten(), torch.tensor([std]).double())
    torch.testing.assert_close(
        step.mean.flatten(), torch.tensor([0.75 * 0.8 + (0.25**2 - std**2) ** 0.5 * 1.2]).double()
    )
    assert float(precise(x, v, 1.0, 0.75, noise_level=1.0).std) == 0.75  # all noise anew
    assert float(precise(x, v, 0.5, 0.0, noise_level=1.0).std) == 0.0
    torch.testing.assert_close(precise(x, v, 0.5, 0.25, noise_level=2**0.5), flow_ddim(x, v, 0.5, 0.25, eta=1.0))
