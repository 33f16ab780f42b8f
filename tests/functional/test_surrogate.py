"""Policy-gradient surrogates: by hand, then the identity laws of spatial credit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlt2i.functional.gaussian import kl_map, log_prob_map
from rlt2i.functional.surrogate import (
    clipped_surrogate,
    flow_dppo_surrogate,
    grpo_guard_log_ratio,
    pool_log_ratio,
    reinforce,
    scaled_clip_range,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_clipped_surrogate_by_hand():
    # Ratios 2, .5, 1, 2, .5 against a range of .1, advantages +1, +1, +1, -1, -1.
    log_ratio = torch.tensor([2.0, 0.5, 1.0, 2.0, 0.5], dtype=torch.float64).log().requires_grad_()
    result = clipped_surrogate(log_ratio, torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]), 0.1, weight=2.0)
    torch.testing.assert_close(result.loss, torch.tensor([-2.2, -1.0, -2.0, 4.0, 1.8], dtype=torch.float64))
    assert result.clipped_high.tolist() == [True, False, False, False, False]
    assert result.clipped_low.tolist() == [False, False, False, False, True]
    result.loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0.0, -1.0, -2.0, 4.0, 0.0], dtype=torch.float64))


def test_clip_range_may_differ_from_element_to_element():
    log_ratio, advantage = torch.tensor([0.2, 0.2]), torch.ones(2)
    result = clipped_surrogate(log_ratio, advantage, torch.tensor([0.1, 0.5]))
    assert result.clipped_high.tolist() == [True, False]


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 0.5), st.integers(0, 1000))
def test_on_policy_the_gradient_is_the_plain_policy_gradient(clip_range, seed):
    log_prob = normal(3, 4, 4, seed=seed).requires_grad_()
    advantage, weight = normal(3, 1, 1, seed=seed + 1), normal(3, 4, 4, seed=seed + 2).abs()
    result = clipped_surrogate(log_prob - log_prob.detach(), advantage, clip_range, weight=weight)
    assert (result.ratio == 1).all()
    assert not (result.clipped_high | result.clipped_low).any()
    (clipped,) = torch.autograd.grad(result.loss.sum(), log_prob)
    (plain,) = torch.autograd.grad(reinforce(log_prob, advantage, weight=weight).sum(), log_prob)
    torch.testing.assert_close(clipped, plain, rtol=0, atol=1e-15)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 6)])
def test_a_constant_map_gives_flow_grpos_gradient_on_policy_at_every_granularity(grid):
    x_next, mean, advantage = normal(3, 5, 4, 6), normal(3, 5, 4, 6, seed=1).requires_grad_(), normal(3, seed=2)
    value = log_prob_map(x_next, mean, 0.3)
    ratio = pool_log_ratio(value - value.detach(), grid)
    located = clipped_surrogate(ratio, advantage[:, None, None], 1e-4, weight=torch.ones(3, *grid)).loss.mean()
    whole = clipped_surrogate((value - value.detach()).mean(dim=(1, 2)), advantage, 1e-4).loss.mean()
    gradients = [torch.autograd.grad(loss, mean, retain_graph=True)[0] for loss in (located, whole)]
    torch.testing.assert_close(*gradients)


def test_permuting_places_permutes_gradients():
    x_next, mean, weight = normal(2, 3, 1, 8), normal(2, 3, 1, 8, seed=1), normal(2, 1, 8, seed=2).abs()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))

    def gradient(*inputs: Tensor) -> Tensor:
        action, centre, map_ = inputs
        centre = centre.clone().requires_grad_()
        value = log_prob_map(action, centre, 0.5)
        clipped_surrogate(value - value.detach(), torch.ones(2, 1, 1), 0.1, weight=map_).loss.mean().backward()
        return centre.grad

    permuted = gradient(x_next[..., order], mean[..., order], weight[..., order])
    torch.testing.assert_close(permuted, gradient(x_next, mean, weight)[..., order])


def test_pooling_by_hand():
    log_ratio = torch.arange(8.0).view(1, 2, 4)  # 0 1 2 3 / 4 5 6 7
    torch.testing.assert_close(pool_log_ratio(log_ratio, (1, 2)), torch.tensor([[[2.5, 4.5]]]))
    torch.testing.assert_close(pool_log_ratio(log_ratio, (1, 1)), torch.tensor([[[3.5]]]))
    assert torch.equal(pool_log_ratio(log_ratio, (2, 4)), log_ratio)


def test_the_clip_range_follows_the_noise():
    # The mean of P independent log-ratios is sqrt(P) times quieter than one of them, and so is the clip range.
    fine = normal(4000, 4, 4)
    whole = pool_log_ratio(fine, (1, 1))
    assert (fine.std() / whole.std()).item() == pytest.approx(4.0, rel=0.05)
    assert scaled_clip_range(1e-4, 16) == pytest.approx(4e-4)
    assert scaled_clip_range(1e-4, 1) == 1e-4


def test_grpo_guard_leaves_the_noise_term_alone():
    # log rho = (2 z std dmu - dmu^2) / (2 std^2): adding the drift and multiplying by std leaves mean_C(z dmu).
    old_mean, z, shift = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), 1e-3 * normal(2, 3, 4, 4, seed=2)
    std = torch.tensor([0.5, 0.2], dtype=torch.float64)
    x_next = old_mean + std[:, None, None, None] * z
    log_ratio = log_prob_map(x_next, old_mean + shift, std) - log_prob_map(x_next, old_mean, std)
    guarded = grpo_guard_log_ratio(log_ratio, old_mean + shift, old_mean, std)
    torch.testing.assert_close(guarded, (z * shift).mean(dim=1), rtol=1e-8, atol=1e-12)


def test_grpo_guard_by_sample_and_by_batch_share_their_mean_drift():
    mean, old, zero = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1), torch.zeros(2, 4, 4)
    sample, batch = (grpo_guard_log_ratio(zero, mean, old, 0.5, bias=bias) for bias in ("sample", "batch"))
    assert sample.mean().item() == pytest.approx(batch.mean().item())
    assert (batch == batch[0, 0, 0]).all()


def test_flow_dppo_masks_only_what_is_far_and_moves_further():
    ratio = torch.tensor([2.0, 0.5, 2.0, 0.5, 2.0], dtype=torch.float64)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    divergence = torch.tensor([9.0, 9.0, 9.0, 9.0, 0.0])
    log_ratio = ratio.log().requires_grad_()
    result = flow_dppo_surrogate(log_ratio, advantage, divergence, 1.0)
    torch.testing.assert_close(result.loss, torch.tensor([0.0, -0.5, 2.0, 0.0, -2.0], dtype=torch.float64))
    assert result.clipped_high.tolist() == [True, False, False, False, False]
    assert result.clipped_low.tolist() == [False, False, False, True, False]
    result.loss.sum().backward()
    assert (log_ratio.grad == 0).tolist() == [True, False, False, True, False]


def test_flow_dppo_works_per_location():
    mean, old = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    divergence = pool_log_ratio(kl_map(mean, old, 0.5), (2, 2))
    assert flow_dppo_surrogate(torch.zeros(2, 2, 2), torch.ones(2, 1, 1), divergence, 1e-5).loss.shape == (2, 2, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: clipped_surrogate(torch.zeros(3), torch.ones(3), 0.0), "clip_range=0.0"),
        (lambda: clipped_surrogate(torch.zeros(3, 1), torch.ones(3), 0.1), "would expand the loss"),
        (lambda: clipped_surrogate(torch.zeros(3), torch.ones(1, 3), 0.1), "would expand the loss"),
        (lambda: reinforce(torch.zeros(3), torch.ones(3), weight=torch.ones(2)), "weight of shape"),
        (lambda: pool_log_ratio(torch.zeros(1, 4, 4), (3, 2)), r"grid=\(3, 2\)"),
        (lambda: scaled_clip_range(0.1, 0), "merged=0"),
        (
            lambda: grpo_guard_log_ratio(
                torch.zeros(1, 2, 2), torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), 1.0, bias="none"
            ),
            "bias='none'",
        ),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_half_precision_log_ratios_are_lifted():
    result = clipped_surrogate(torch.zeros(2, dtype=torch.bfloat16), torch.ones(2), 1e-4)
    assert result.loss.dtype == torch.float32
    assert math.isclose(result.ratio[0].item(), 1.0)
