"""Forward-process objectives and preferences: by hand, then laws."""

import math

import pytest
import torch
from torch import Tensor

from rlt2i.functional.awm import awm_advantage, awm_kl_map, awm_log_likelihood, awm_noise_scale
from rlt2i.functional.group_matching import (
    crd_centred_loss,
    crd_kl_weight,
    crd_loss,
    crd_pool,
    crd_reward_map,
    dgpo_clipped,
    dgpo_group_weight,
    dgpo_loss_map,
)
from rlt2i.functional.matching import (
    adaptive_weight,
    flow_matching_error,
    nft_branch_error,
    nft_branches,
    nft_label,
    nft_loss_map,
    noised,
    weighted_matching_loss_map,
)
from rlt2i.functional.preference import dpo_logits, dpo_loss
from rlt2i.functional.surrogate import clipped_surrogate
from rlt2i.functional.transitions import euler
from tests.helpers.published_advantages import awm_sum_first


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """v, v_old, x0, noise."""
    return tuple(normal(4, 3, 2, 5, seed=seed, dtype=dtype) for seed in range(4))


def pixel(*channels: float) -> Tensor:
    """One sample, one place."""
    return torch.tensor(channels, dtype=torch.float64).view(1, -1, 1, 1)


SIGMA = torch.tensor([0.1, 0.4, 0.7, 1.0])


def gradient(loss: Tensor, v: Tensor) -> Tensor:
    return torch.autograd.grad(loss, v, retain_graph=True)[0]


def test_flow_matching_error_by_hand():
    # Targets 3 - 1 = 2 and 0 - 1 = -1; errors 1 and 3: mean of squares 5.
    assert flow_matching_error(pixel(3.0, 2.0), pixel(1.0, 1.0), pixel(3.0, 0.0)).item() == 5.0


def test_the_target_velocity_leads_from_any_noise_back_to_the_image():
    _, _, x0, noise = batch()
    x = noised(x0, noise, SIGMA)
    torch.testing.assert_close(euler(x, noise - x0, SIGMA, 0.0).mean, x0)
    assert (flow_matching_error(noise - x0, x0, noise) == 0).all()


def test_nft_by_hand():
    # x0 = 0, noise = 1 so v* = 1; sigma .5, v = 3, v_old = 1, beta = 1: v+ = 3, v- = -1.
    # x0 errors .5 * 2 = 1 and 1, both weights 1, so any label gives 5 * 1.
    args = pixel(3.0), pixel(1.0), pixel(0.0), pixel(1.0), 0.5
    positive, negative = nft_branches(*args[:2], beta=1.0)
    assert (positive.item(), negative.item()) == (3.0, -1.0)
    assert nft_branch_error(positive, *args[2:]).item() == 1.0
    assert nft_loss_map(*args, torch.tensor([0.3])).item() == pytest.approx(5.0)
    assert nft_loss_map(*args, torch.tensor([0.3]), weight=2.0, clip=1.0).item() == pytest.approx(2.0)


def test_nft_labels_by_hand():
    advantage = torch.tensor([-10.0, -2.5, 0.0, 1.0])
    for mode, expected in {
        "all": [0.0, 0.25, 0.5, 0.6],
        "positive_only": [0.5, 0.5, 0.5, 0.6],
        "negative_only": [0.0, 0.25, 0.5, 0.5],
        "one_only": [0.5, 0.5, 0.5, 0.6],
        "binary": [0.4, 0.4, 0.5, 0.6],
    }.items():
        torch.testing.assert_close(nft_label(advantage, mode=mode), torch.tensor(expected))


def test_on_policy_nft_is_an_advantage_weighted_matching_gradient():
    _, v, x0, noise = batch()
    v = v.requires_grad_()
    label = torch.tensor([0.0, 0.3, 0.5, 1.0])
    loss = nft_loss_map(v, v.detach(), x0, noise, SIGMA, label, beta=0.2).mean()
    scale = adaptive_weight(SIGMA[:, None, None, None].double() * (noise - x0 - v.detach()))
    preference = (5.0 * (2 * label - 1) * SIGMA**2).double()[:, None, None] / scale
    expected = (preference * flow_matching_error(v, x0, noise)).mean()
    torch.testing.assert_close(gradient(loss, v), gradient(expected, v), rtol=1e-6, atol=1e-9)


def test_a_label_of_one_half_is_no_preference_and_a_weight_of_zero_no_loss():
    v, v_old, x0, noise = batch()
    v = v_old.clone().requires_grad_()
    label = torch.full((4, 2, 5), 0.5)
    label[:, 0] = 1.0
    on_policy = nft_loss_map(v, v_old, x0, noise, SIGMA, label).mean()
    assert gradient(on_policy, v)[:, :, 1].abs().max() < 1e-12
    assert (gradient(on_policy, v)[:, :, 0] != 0).any()
    # Away from the old policy, one half pulls back; weight zero does not care.
    v = (v_old + 1).requires_grad_()
    half = nft_loss_map(v, v_old, x0, noise, SIGMA, torch.full((4,), 0.5)).mean()
    nothing = nft_loss_map(v, v_old, x0, noise, SIGMA, torch.ones(4), weight=torch.zeros(4, 2, 5)).mean()
    assert gradient(half, v).abs().max() > 0
    assert gradient(nothing, v).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_keep_the_dtype(dtype):
    v, v_old, x0, noise = batch(dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert nft_loss_map(v, v_old, x0, noise, SIGMA, torch.ones(4)).dtype == wanted
    assert crd_reward_map(v, v_old, x0, noise).dtype == wanted
    assert flow_matching_error(v, x0, noise).dtype == wanted


def test_uniform_weights_change_no_loss():
    v, v_old, x0, noise = batch()
    ones, label = torch.ones(4, 2, 5), torch.tensor([0.0, 0.3, 0.5, 1.0])
    error, reference = flow_matching_error(v, x0, noise), flow_matching_error(v_old, x0, noise)
    advantage = torch.tensor([1.0, -1.0, 2.0, -2.0])
    group = dgpo_group_weight(error, reference, advantage, 2)
    for weighted, plain in (
        (
            nft_loss_map(v, v_old, x0, noise, SIGMA, label, weight=ones),
            nft_loss_map(v, v_old, x0, noise, SIGMA, label),
        ),
        (weighted_matching_loss_map(error, advantage, weight=ones), weighted_matching_loss_map(error, advantage)),
        (dgpo_group_weight(error, reference, advantage, 2, weight=ones), group),
        (dgpo_loss_map(error, advantage, group, weight=ones), dgpo_loss_map(error, advantage, group)),
        (awm_kl_map(v, v_old, SIGMA, weight=ones), awm_kl_map(v, v_old, SIGMA)),
        (
            dpo_logits(error, reference, reference, error, weight_winner=ones, weight_loser=ones),
            dpo_logits(error, reference, reference, error),
        ),
    ):
        assert torch.equal(weighted, plain)


def test_awm_by_hand():
    error, t = torch.tensor([4.0, 9.0], dtype=torch.float64), torch.tensor([0.5, 0.1])
    for weighting, expected in {
        "uniform": [-4.0, -9.0],
        "t": [-2.0, -0.9],
        "t2": [-1.0, -0.09],
        "huber": [-1.0, -0.3],
        "ghuber": [-1.0, -0.3],  # power .5: (sqrt m) t / .5 is twice that
    }.items():
        value = awm_log_likelihood(error, t, weighting=weighting, power=0.5)
        factor = 2.0 if weighting == "ghuber" else 1.0
        torch.testing.assert_close(value, factor * torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(awm_advantage(torch.tensor([-9.0, 2.5]), scale=2.0), torch.tensor([-2.0, 1.0]))
    torch.testing.assert_close(awm_noise_scale(torch.tensor([0.5, 1.0])), torch.tensor([0.7, 7.0]))
    elbo = awm_kl_map(pixel(3.0, 1.0), pixel(0.0, 0.0), 0.5, weighting="elbo")
    assert elbo.item() == pytest.approx(5.0 / (2 * 0.49))


def test_awm_sum_first_by_hand():
    # Two samples at three times, times outermost: means of (1, 3, 5) and of (2, 4, 9).
    log_ratio = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 9.0], requires_grad=True)
    torch.testing.assert_close(awm_sum_first(log_ratio, 3), torch.tensor([3.0, 5.0]))
    with pytest.raises(ValueError, match="times=4 does not divide 6 log-ratios"):
        awm_sum_first(log_ratio, 4)
    # On policy it has the gradient of one ratio per sample and time.
    on_policy, advantage = log_ratio - log_ratio.detach(), torch.tensor([1.0, -2.0])
    sum_first = clipped_surrogate(awm_sum_first(on_policy, 3), advantage, 0.1).loss.mean()
    exp_first = clipped_surrogate(on_policy, advantage.repeat(3), 0.1).loss.mean()
    torch.testing.assert_close(gradient(sum_first, log_ratio), gradient(exp_first, log_ratio))


def test_on_policy_awm_has_ratio_one_and_pulls_towards_good_samples():
    v, _, x0, noise = batch()
    v = v.requires_grad_()
    value = awm_log_likelihood(flow_matching_error(v, x0, noise), SIGMA)
    result = clipped_surrogate(value - value.detach(), torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None], 1.0)
    assert (result.ratio == 1).all()
    step = -gradient(result.loss.sum(), v)
    towards = (step * (noise - x0 - v)).sum(dim=(1, 2, 3))
    assert (towards > 0).tolist() == [True, False, True, False]


def test_sft_and_rwr_by_hand():
    error = torch.tensor([[[1.0, 3.0]], [[2.0, 2.0]]])
    loss = weighted_matching_loss_map(error, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor([[[2.0, 6.0]], [[0.0, 0.0]]]))


def test_dgpo_by_hand():
    # Error gaps +-.5 with advantages +-1: sum A gap / G = .5, so W = sigmoid(2 * .5).
    error = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    reference = torch.tensor([0.5, 2.5]).view(2, 1, 1)
    weight = dgpo_group_weight(error, reference, torch.tensor([1.0, -1.0]), 2, beta=2.0)
    expected = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(weight, torch.tensor([expected, expected]))
    loss = dgpo_loss_map(error, torch.tensor([1.0, -1.0]), weight)
    torch.testing.assert_close(loss.flatten(), torch.tensor([expected, -2 * expected]))


def test_dgpo_groups_are_independent_and_learned_groups_weigh_less():
    error, reference = normal(6, 2, 2).abs(), normal(6, 2, 2, seed=1).abs()
    advantage = normal(6, seed=2)
    together = dgpo_group_weight(error, reference, advantage, 3, beta=1.0)
    alone = dgpo_group_weight(error[:3], reference[:3], advantage[:3], 3, beta=1.0)
    torch.testing.assert_close(together[:3], alone)
    scattered = dgpo_group_weight(
        error[[0, 3, 1, 4, 2, 5]],
        reference[[0, 3, 1, 4, 2, 5]],
        advantage[[0, 3, 1, 4, 2, 5]],
        torch.tensor([0, 1, 0, 1, 0, 1]),
        beta=1.0,
    )
    torch.testing.assert_close(scattered, together[[0, 3, 1, 4, 2, 5]])
    better = error - 0.5 * advantage[:, None, None]  # good samples fitted better, bad ones worse
    assert (dgpo_group_weight(better, reference, advantage, 3, beta=1.0) < together).all()


def test_dgpo_clip_by_hand():
    # exp(m_old - m): 2, 2, .5, .5
    error = torch.zeros(4, 1, 1)
    old = torch.tensor([2.0, 2.0, 0.5, 0.5]).log().view(4, 1, 1)
    clipped = dgpo_clipped(error, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), clip_range=0.1)
    assert clipped.tolist() == [True, False, False, True]


def test_crd_by_hand():
    # Rewards 1 and 3 with labels 1 and 0: centred -1, 1 against .5, -.5: squares 2.25.
    reward, label = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0])
    torch.testing.assert_close(crd_loss(reward, label, 2), torch.tensor([2.25, 2.25]))
    # Centred on the good sample only: 0 and 2 against 0 and -1.
    one_sided = crd_centred_loss(reward, label, torch.tensor([1.0, 0.0]), 2)
    torch.testing.assert_close(one_sided, torch.tensor([0.0, 9.0]))
    torch.testing.assert_close(crd_kl_weight(label, kl_beta=0.1), torch.tensor([1.0, 0.001]))


def test_crd_reward_is_zero_on_policy_and_grows_with_the_fit():
    _v, v_old, x0, noise = batch()
    assert (crd_reward_map(v_old, v_old, x0, noise) == 0).all()
    closer = v_old + 0.5 * (noise - x0 - v_old)
    assert (crd_reward_map(closer, v_old, x0, noise, adaptive=False) > 0).all()
    assert crd_reward_map(closer, v_old, x0, noise).mean() > 0


def test_crd_pools_are_shares_of_each_group():
    label = torch.tensor([0.1, 0.9, 0.5, 0.5])
    for temperature in (math.inf, 0.3, -0.3):
        torch.testing.assert_close(crd_pool(label, 2, temperature=temperature).view(2, 2).sum(dim=1), torch.ones(2))
    assert crd_pool(label, 2, temperature=0.01)[1] > 0.99
    assert crd_pool(label, 2, temperature=-0.01)[0] > 0.99


def test_crd_compares_within_prompts_by_default_and_over_the_batch_on_request():
    reward, label = torch.tensor([1.0, 3.0, 100.0, 102.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    # An offset per prompt is invisible within prompts, and dominates over the batch.
    torch.testing.assert_close(crd_loss(reward, label, 2), torch.full((4,), 2.25))
    assert crd_loss(reward, label, 4).min() > 2000
    bce = crd_loss(reward, label, 2, form="bce", temperature=0.5)
    assert torch.isfinite(bce).all()


def test_dpo_by_hand():
    # Winner improved by .1 and loser got worse by .3: z = -.5 * 10 * (-.1 - .3) = 2.
    def error(value: float) -> Tensor:
        return torch.full((1, 2, 2), value, dtype=torch.float64)

    logits = dpo_logits(error(0.9), error(1.3), error(1.0), error(1.0), beta=10.0)
    assert logits.item() == pytest.approx(2.0)
    assert dpo_loss(logits).item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert dpo_loss(torch.zeros(1)).item() == pytest.approx(math.log(2))


def test_dpo_is_antisymmetric_and_weights_sit_inside_the_logit():
    winner, loser, ref_w, ref_l = (normal(3, 2, 2, seed=seed).abs() for seed in range(4))
    logits = dpo_logits(winner, loser, ref_w, ref_l)
    torch.testing.assert_close(dpo_logits(loser, winner, ref_l, ref_w), -logits)
    halves = torch.zeros(3, 2, 2)
    halves[:, 0] = 2.0  # mean one, all on the upper row
    upper = dpo_logits(winner, loser, ref_w, ref_l, weight_winner=halves, weight_loser=halves)
    rows = [error[:, :1] for error in (winner, loser, ref_w, ref_l)]
    torch.testing.assert_close(upper, dpo_logits(*rows))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda v: nft_branches(v, v, beta=0.0), "beta=0.0"),
        (lambda v: nft_label(v, clip=0.0), "clip=0.0"),
        (lambda v: nft_label(v, mode="some"), "mode='some'"),
        (lambda v: nft_loss_map(v, v, v, v, 0.5, torch.ones(4, 1, 1, 5)), "label of shape"),
        (lambda v: weighted_matching_loss_map(v[:, 0], torch.ones(3)), "advantage has shape"),
        (lambda v: awm_log_likelihood(v[:, 0], 0.5, weighting="t3"), "weighting='t3'"),
        (lambda v: awm_log_likelihood(v[:, 0], 0.5, power=0.0), "power=0.0"),
        (lambda v: awm_advantage(v, clip=0.0), "clip=0.0"),
        (lambda v: awm_kl_map(v, v, 0.5, weighting="kl"), "weighting='kl'"),
        (lambda v: dgpo_group_weight(v[:, 0], v[:, 0], torch.ones(4), 3), "group_size=3"),
        (lambda v: crd_pool(torch.ones(4), 2, temperature=0.0), "temperature=0"),
        (lambda v: crd_loss(torch.ones(4), torch.ones(4), 2, temperature=-1.0), "temperature=-1.0"),
        (lambda v: crd_loss(torch.ones(4), torch.ones(4), 2, form="l1"), "form='l1'"),
        (lambda v: crd_kl_weight(torch.ones(4), kl_beta=0.0), "kl_beta=0.0"),
        (lambda v: dpo_logits(*[v[:, 0]] * 4, beta=0.0), "beta=0.0"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(normal(4, 3, 2, 5))
