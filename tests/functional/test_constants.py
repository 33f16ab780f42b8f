"""Which inputs of a formula are constants: data, old policies, references and credit carry no gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlt2i.functional import group_matching, matching
from rlt2i.functional.awm import awm_kl_map
from rlt2i.functional.gaussian import cps_log_prob_map, log_prob_map
from rlt2i.functional.preference import dpo_logits
from rlt2i.functional.surrogate import flow_dppo_surrogate, grpo_guard_log_ratio
from rlt2i.functional.transitions import flow_sde
from tests.helpers.published_steps import ema_update

GROUPS = torch.tensor([0, 0, 1, 1])
SIGMA = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)


def draws(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(s, generator=generator, dtype=torch.float64).add(0.1).requires_grad_() for s in shapes]


LATENT, MAP, SAMPLE = (4, 2, 3, 3), (4, 3, 3), (4,)

# Formula, shapes of its inputs, and the places of those that learn; all others are constants.
FORMULAS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "log_prob_map": (lambda x, mean: log_prob_map(x, mean, 0.5), (LATENT, LATENT), (1,)),
    "cps_log_prob_map": (cps_log_prob_map, (LATENT, LATENT), (1,)),
    "grpo_guard_log_ratio": (
        lambda ratio, mean, old: grpo_guard_log_ratio(ratio, mean, old, 0.5), (MAP, LATENT, LATENT), (0, 1),
    ),
    "flow_dppo_surrogate": (
        lambda ratio, kl: flow_dppo_surrogate(ratio, torch.ones(4, 1, 1), kl, 0.5).loss, (MAP, MAP), (0,),
    ),
    "nft_branches": (lambda v, old: matching.nft_branches(v, old, beta=0.5)[1], (LATENT, LATENT), (0,)),
    "nft_loss_map": (
        lambda v, old, label, weight: matching.nft_loss_map(
            v, old, v.detach() * 2, v.detach() + 1, SIGMA, label, weight=weight, beta=0.5
        ),
        (LATENT, LATENT, SAMPLE, MAP), (0,),
    ),
    "weighted_matching_loss_map": (
        lambda error, advantage, weight: matching.weighted_matching_loss_map(error, advantage, weight=weight),
        (MAP, MAP, MAP), (0,),
    ),
    "awm_kl_map": (lambda v, other, w: awm_kl_map(v, other, SIGMA, weight=w), (LATENT, LATENT, MAP), (0,)),
    "dgpo_loss_map": (
        lambda error, advantage, group, weight: group_matching.dgpo_loss_map(error, advantage, group, weight=weight),
        (MAP, SAMPLE, SAMPLE, MAP), (0,),
    ),
    "crd_reward_map": (
        lambda v, old: group_matching.crd_reward_map(v, old, v.detach() * 2, v.detach() + 1), (LATENT, LATENT), (0,),
    ),
    "crd_centred_loss": (
        lambda reward, label, pool: group_matching.crd_centred_loss(reward, label, pool, GROUPS),
        (SAMPLE, SAMPLE, SAMPLE),
        (0,),
    ),
    "dpo_logits": (
        lambda w, l, rw, rl, cw, cl: dpo_logits(w, l, rw, rl, weight_winner=cw, weight_loser=cl), (MAP,) * 6, (0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_only_the_policy_learns(name: str):
    formula, shapes, learning = FORMULAS[name]
    inputs = draws(*shapes)
    gradients = torch.autograd.grad(formula(*inputs).sum(), inputs, allow_unused=True)
    for place, gradient in enumerate(gradients):
        moved = gradient is not None and bool((gradient != 0).any())
        assert moved == (place in learning), f"{name}: input {place}"


@pytest.mark.parametrize(
    "constant",
    [
        lambda a, b: matching.adaptive_weight(torch.stack([a, b], dim=1)),
        lambda a, b: group_matching.dgpo_group_weight(a, b, a.mean(dim=(1, 2)), GROUPS, weight=b),
        lambda a, b: group_matching.dgpo_clipped(a, b, a.mean(dim=(1, 2)), clip_range=0.1).double(),
        lambda a, b: group_matching.crd_pool(a.mean(dim=(1, 2)), GROUPS, temperature=1.0),
        lambda a, b: ema_update(a, b, 0.9),
        lambda a, b: flow_dppo_surrogate(a, b, b, 0.5).ratio,
    ],
)
def test_weights_and_averages_are_constants(constant: Callable[[Tensor, Tensor], Tensor]):
    assert not constant(*draws(MAP, MAP)).requires_grad


def test_a_sample_learns_nothing_from_what_it_is_centred_on():
    (reward,) = draws(SAMPLE)
    label, pool = torch.tensor([0.0, 1.0, 0.3, 0.6]).double(), torch.full((4,), 0.5).double()
    for index in range(4):
        loss = group_matching.crd_centred_loss(reward, label, pool, GROUPS)[index]
        (gradient,) = torch.autograd.grad(loss, reward)
        assert gradient.nonzero()[:, 0].tolist() == [index]


def test_the_adaptive_scale_of_a_branch_is_a_constant():
    # l = |r|^2 / w with w = mean |r| held fixed: the gradient is 2 r / (n w), twice that of the mean of |r|.
    v, old = torch.tensor([3.0]).double().view(1, 1, 1, 1).requires_grad_(), torch.zeros(1, 1, 1, 1).double()
    zero, one = torch.zeros_like(old), torch.ones(1).double()
    loss = matching.nft_loss_map(v, old, zero, zero, 1.0, one, beta=1.0, clip=1.0).sum()  # residual -3, w = 3
    assert loss.item() == pytest.approx(3.0)
    assert torch.autograd.grad(loss, v)[0].item() == pytest.approx(2.0)


def test_the_adaptive_scale_has_a_floor():
    # A residual of 1e-7 divides by 1e-5, not by itself: l = 1e-14 / 1e-5.
    residual = torch.full((1, 1, 2, 2), 1e-7).double()
    assert matching.adaptive_weight(residual).item() == pytest.approx(1e-5)
    zero = torch.zeros_like(residual)
    error = matching.nft_branch_error(-residual, zero, zero, 1.0)
    torch.testing.assert_close(error, torch.full((1, 2, 2), 1e-9).double())


def test_flow_dppo_masks_from_the_threshold_on():
    ratio, divergence = torch.tensor([0.1, 0.1]), torch.tensor([0.5, 0.49])
    masked = flow_dppo_surrogate(ratio, torch.ones(2), divergence, 0.5).clipped_high
    assert masked.tolist() == [True, False]


def test_the_denominator_of_flow_sde_uses_the_second_sigma_at_pure_noise_only():
    # At sigma 1: s = a / sqrt(1 - .9); at .95 it is its own: s = a sqrt(.95 / .05).
    zeros = torch.zeros(2, 1, 1, 1).double()
    step = flow_sde(zeros, zeros, torch.tensor([1.0, 0.95], dtype=torch.float64), 0.9, sigma_max=0.9, noise_level=1.0)
    torch.testing.assert_close(step.scale.flatten(), torch.tensor([10.0, 19.0]).double().sqrt())
