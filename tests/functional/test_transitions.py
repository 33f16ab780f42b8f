"""Transition kernels, Gaussian maps, solvers and the change of variables: by hand, then laws."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlt2i.functional.epsilon import (
    epsilon_to_velocity,
    flow_to_vp,
    scaled_linear_alpha_bars,
    v_prediction_to_velocity,
    vp_alpha_bar,
    vp_sigma,
    vp_sigmas,
)
from rlt2i.functional.gaussian import cps_log_prob_map, kl_map, log_prob_map, reference_kl_map, squared_error_map
from rlt2i.functional.schedules import sd3_sigmas
from rlt2i.functional.solvers import dpm_solver_2m
from rlt2i.functional.transitions import (
    Transition,
    clean_prediction,
    cps,
    dance_sde,
    euler,
    flow_ddim,
    flow_sde,
    noise_prediction,
)
from tests.helpers.published_steps import ddim, dpm_solver_1, transition_to_flow, vp_to_flow

SHAPE = (3, 4, 2, 6)


def latents(*seeds: int, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds]


KERNELS = {
    "flow_sde": lambda x, v, now, then, level: flow_sde(x, v, now, then, sigma_max=0.96, noise_level=level),
    "dance_sde": lambda x, v, now, then, level: dance_sde(x, v, now, then, eta=level),
    "cps": lambda x, v, now, then, level: cps(x, v, now, then, noise_level=level),
    "flow_ddim": lambda x, v, now, then, level: flow_ddim(x, v, now, then, eta=level),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())


def one(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def test_flow_sde_by_hand():
    # sigma .5 -> .25, a = 1: s = sqrt(.5/.5) = 1, dt = -.25, std = .5, s^2/(2 sigma) = 1:
    # mean = 2 (1 - .25) + 4 (1 + .5)(-.25) = 1.5 - 1.5 = 0
    step = flow_sde(one(2.0), one(4.0), 0.5, 0.25, sigma_max=0.9, noise_level=1.0)
    assert (step.mean.item(), step.std.item(), step.scale.item()) == (0.0, 0.5, 1.0)


def test_first_step_of_flow_sde_has_std_a():
    # 1 - sigma_1 = -dt cancels the step size.
    step = flow_sde(one(0.0), one(0.0), 1.0, 0.96, sigma_max=0.96, noise_level=0.7)
    assert step.std.item() == pytest.approx(0.7)


# Ten steps of the SD3 schedule, a = .7 for Flow-SDE, .8 for CPS, .3 for Dance-SDE. By step: -dt; s, full std and
# |d mean / d v| of Flow-SDE; full std and |d mean / d v| of CPS; full std of Dance-SDE and its |d mean / d v| / std.
TEN_STEPS = (
    (0.0399, 3.506, 0.7000, 0.0399, 0.9131, 0.0399, 0.0599, 0.666),
    (0.0468, 3.435, 0.7430, 0.0582, 0.8686, 0.0719, 0.0649, 0.722),
    (0.0557, 2.273, 0.5362, 0.0693, 0.8157, 0.1070, 0.0708, 0.790),
    (0.0673, 1.719, 0.4459, 0.0838, 0.7517, 0.1450, 0.0778, 0.871),
    (0.0831, 1.359, 0.3918, 0.1034, 0.6727, 0.1855, 0.0865, 0.972),
    (0.1051, 1.088, 0.3528, 0.1309, 0.5727, 0.2269, 0.0973, 1.101),
    (0.1373, 0.861, 0.3191, 0.1709, 0.4421, 0.2651, 0.1112, 1.272),
    (0.1868, 0.652, 0.2820, 0.2326, 0.2644, 0.2896, 0.1297, 1.515),
    (0.2691, 0.434, 0.2254, 0.3351, 0.0085, 0.2736, 0.1556, 1.931),
    (0.0089, 0.066, 0.0063, 0.0111, 0.0000, 0.0089, 0.0283, 1.888),
)


def test_ten_steps_of_the_sd3_schedule():
    sigmas, zero, unit = sd3_sigmas(10).double(), one(0), one(1)
    for (now, then), row in zip(pairwise(sigmas), TEN_STEPS, strict=True):
        flow = flow_sde(zero, unit, now, then, sigma_max=sigmas[1], noise_level=0.7)
        kept = cps(zero, unit, now, then, noise_level=0.8)
        dance = dance_sde(zero, unit, now, then, eta=0.3)
        found = (
            *(now - then, flow.scale, flow.std, flow.mean.abs()),
            *(kept.std, kept.mean.abs(), dance.std, dance.mean.abs() / dance.std),
        )
        for value, stated in zip(found, row, strict=True):
            assert float(value) == pytest.approx(stated, abs=6e-4 if stated in (row[1], row[-1]) else 6e-5)


def test_dance_sde_by_hand():
    # eps_hat = 2 + .5 * 4 = 4, score = -8, dt = -.25: mean = 2 - 1 + .5 * 4 * 8 * (-.25) = -3
    step = dance_sde(one(2.0), one(4.0), 0.5, 0.25, eta=2.0)
    assert (step.mean.item(), step.std.item(), step.scale.item()) == (-3.0, 1.0, 2.0)


def test_cps_by_hand():
    # a = 1 draws all the noise anew: std = sigma', mean = (1 - sigma') x0_hat with x0_hat = 2 - .5 * 4 = 0.
    step = cps(one(2.0), one(4.0), 0.5, 0.25, noise_level=1.0)
    assert step.mean.item() == pytest.approx(0.0, abs=1e-15)
    assert step.std.item() == 0.25


def test_predictions_by_hand():
    assert clean_prediction(one(2.0), one(4.0), 0.5).item() == 0.0
    assert noise_prediction(one(2.0), one(4.0), 0.5).item() == 4.0


@every_kernel
def test_no_noise_is_the_euler_step(kernel):
    x, v = latents(0, 1)
    step = kernel(x, v, 0.6, 0.4, 0.0)
    torch.testing.assert_close(step.mean, euler(x, v, 0.6, 0.4).mean)
    assert (step.std == 0).all()


@every_kernel
def test_every_sample_has_its_own_step(kernel):
    x, v = latents(0, 1)
    now, then, level = (torch.tensor(values) for values in ([0.9, 0.6, 0.3], [0.8, 0.3, 0.2], [0.7, 0.0, 0.4]))
    batch = kernel(x, v, now, then, level)
    for row in range(3):
        single = kernel(x[row : row + 1], v[row : row + 1], now[row], then[row], level[row])
        for together, alone in zip(batch, single, strict=True):
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=0)


@every_kernel
def test_dtypes_are_kept_and_half_precision_is_lifted(kernel):
    for dtype, wanted in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        x, v = latents(0, 1, dtype=dtype)
        step = kernel(x, v, torch.tensor(0.6), 0.4, 0.5)
        assert {part.dtype for part in step} == {wanted}
        assert step.mean.shape == SHAPE
        assert step.std.shape == step.scale.shape == (3, 1, 1, 1)
        assert log_prob_map(x, step.mean, step.std).dtype == wanted


@settings(max_examples=25, deadline=None)
@given(now=st.floats(0.05, 1.0), share=st.floats(0.0, 0.99), level=st.floats(0.0, 1.0))
def test_cps_keeps_the_marginal(now: float, share: float, level: float):
    # With the exact velocity of one known pair (x0, eps), x' has mean (1 - sigma') x0 and total noise sigma'.
    then = share * now
    x0, eps = latents(2, 3)
    step = cps((1 - now) * x0 + now * eps, eps - x0, now, then, noise_level=level)
    kept = math.cos(level * math.pi / 2) * then
    torch.testing.assert_close(step.mean, (1 - then) * x0 + kept * eps, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step.std**2 + kept**2, torch.full_like(step.std, then**2), rtol=1e-9, atol=1e-15)


def test_flow_ddim_keeps_the_marginal_too():
    x0, eps = latents(2, 3)
    step = flow_ddim(0.4 * x0 + 0.6 * eps, eps - x0, 0.6, 0.3, eta=0.8)
    kept = torch.sqrt(0.3**2 - step.std**2)
    torch.testing.assert_close(step.mean, 0.7 * x0 + kept * eps)


def test_log_prob_by_hand():
    # One location, two channels with errors 1 and 3, std 2: mean(-(1/8), -(9/8)) - log 2 - log sqrt(2 pi)
    x_next = torch.tensor([[[[1.0]], [[3.0]]]], dtype=torch.float64)
    value = log_prob_map(x_next, torch.zeros_like(x_next), 2.0)
    assert value.shape == (1, 1, 1)
    assert value.item() == pytest.approx(-0.625 - math.log(2) - 0.5 * math.log(2 * math.pi), abs=1e-7)
    assert cps_log_prob_map(x_next, torch.zeros_like(x_next)).item() == -5.0


def test_log_prob_agrees_with_torch():
    x_next, mean = latents(0, 1)
    std = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std[:, None, None, None]).log_prob(x_next).mean(dim=1)
    torch.testing.assert_close(log_prob_map(x_next, mean, std), expected, rtol=0, atol=2e-8)


def test_a_step_without_noise_has_log_prob_zero_and_no_gradient():
    x_next, mean = latents(0, 1)
    mean.requires_grad_()
    value = log_prob_map(x_next, mean, torch.tensor([0.5, 0.0, 0.2]))
    assert torch.isfinite(value).all()
    assert (value[1] == 0).all()
    value.sum().backward()
    assert (mean.grad[1] == 0).all()
    assert (mean.grad[0] != 0).all()


def test_log_prob_does_not_follow_the_action():
    mean, x_next = (tensor.requires_grad_() for tensor in latents(0, 1))
    log_prob_map(x_next, mean, 0.5).sum().backward()
    assert x_next.grad is None


def test_kl_by_hand_and_its_forms():
    # mean_C(4, 16) / (2 * 2^2) = 1.25
    mean = torch.tensor([[[[2.0]], [[4.0]]]])
    assert kl_map(mean, torch.zeros_like(mean), 2.0).item() == 1.25
    x, v, v_ref = latents(0, 1, 2)
    now, ref = (flow_sde(x, u, 0.6, 0.4, sigma_max=0.9, noise_level=0.7) for u in (v, v_ref))
    forms = {form: reference_kl_map(now, ref, v, v_ref, form=form) for form in ("flow_grpo", "exact", "v", "x")}
    torch.testing.assert_close(forms["flow_grpo"], forms["exact"] * 0.2)  # |dt| = .2
    torch.testing.assert_close(forms["v"], squared_error_map(v, v_ref))
    torch.testing.assert_close(forms["x"], forms["exact"] * 2 * now.std[:, 0] ** 2)


def test_exact_kl_agrees_with_torch():
    mean, other = latents(0, 1)
    normals = [torch.distributions.Normal(value, 0.3) for value in (mean, other)]
    expected = torch.distributions.kl_divergence(*normals).mean(dim=1)
    torch.testing.assert_close(kl_map(mean, other, 0.3), expected, rtol=1e-6, atol=0)


def test_kl_of_deterministic_steps_is_zero_and_finite():
    mean, other = latents(0, 1)
    mean.requires_grad_()
    value = kl_map(mean, other, torch.tensor([0.0, 1.0, 1.0]))
    value.sum().backward()
    assert (value[0] == 0).all()
    assert torch.isfinite(mean.grad).all()


def test_first_order_solver_is_the_euler_step():
    x, v = latents(0, 1)
    torch.testing.assert_close(dpm_solver_1(x, v, 0.6, 0.4), euler(x, v, 0.6, 0.4).mean)
    torch.testing.assert_close(dpm_solver_1(x, v, 0.6, 0.0), clean_prediction(x, v, 0.6))


def test_second_order_solver_falls_back_to_first_order_at_both_ends():
    x, v, junk = latents(0, 1, 2)
    for now, then, before in ((1.0, 0.9, 1.0), (0.9, 0.7, 1.0), (0.3, 0.0, 0.5)):
        step = dpm_solver_2m(x, v, now, then, previous_clean=junk, sigma_previous=before)
        torch.testing.assert_close(step, dpm_solver_1(x, v, now, then))


def test_second_order_solver_extrapolates_the_clean_prediction():
    # A constant clean prediction leaves nothing to extrapolate; a changed one moves the step by (1 - s'/s) D1 / 2.
    x, v, other = latents(0, 1, 2)
    clean = clean_prediction(x, v, 0.5)
    same = dpm_solver_2m(x, v, 0.5, 0.4, previous_clean=clean, sigma_previous=0.6)
    torch.testing.assert_close(same, dpm_solver_1(x, v, 0.5, 0.4))
    changed = dpm_solver_2m(x, v, 0.5, 0.4, previous_clean=other, sigma_previous=0.6)
    # lambda is antisymmetric around sigma = .5, so h = h_previous here.
    torch.testing.assert_close(changed - same, 0.2 * 0.5 * (clean - other))


def test_change_of_variables_is_exact():
    x0, eps = latents(0, 1)
    alpha_bar = torch.tensor([0.9, 0.5, 0.02], dtype=torch.float64)
    root, noise = (value.view(3, 1, 1, 1) for value in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    x_vp = root * x0 + noise * eps
    x, sigma = vp_to_flow(x_vp, alpha_bar)
    torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * eps)
    back, level = flow_to_vp(x, sigma.flatten())
    torch.testing.assert_close(back, x_vp)
    torch.testing.assert_close(level.flatten(), alpha_bar)
    torch.testing.assert_close(vp_alpha_bar(vp_sigma(alpha_bar)), alpha_bar)
    torch.testing.assert_close(epsilon_to_velocity(x, eps, sigma.flatten()), eps - x0)
    torch.testing.assert_close(v_prediction_to_velocity(x, root * eps - noise * x0, sigma.flatten()), eps - x0)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_flow_ddim_in_other_coordinates(eta: float):
    x_vp, eps = latents(0, 1)
    now, then = 0.3, 0.7
    x, sigma = vp_to_flow(x_vp, now)
    sigma_next = vp_sigma(torch.tensor(then, dtype=torch.float64))
    ours = flow_ddim(x, epsilon_to_velocity(x, eps, sigma.flatten()), sigma.flatten(), sigma_next, eta=eta)
    for flow, moved in zip(ours, transition_to_flow(ddim(x_vp, eps, now, then, eta=eta), then), strict=True):
        torch.testing.assert_close(flow, moved)
    if eta == 0:
        v = epsilon_to_velocity(x, eps, sigma.flatten())
        torch.testing.assert_close(euler(x, v, sigma.flatten(), sigma_next).mean, ours.mean)


def test_epsilon_schedule_starts_below_pure_noise_and_ends_at_the_image():
    sigmas = vp_sigmas(scaled_linear_alpha_bars(), torch.tensor([999, 666, 333, 0]))
    assert 0.9 < sigmas[0] < 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: flow_sde(x, x, 0.5, 0.4, sigma_max=0.9, noise_level=-1.0), "noise_level=-1.0"),
        (lambda x: cps(x, x, 0.5, 0.4, noise_level=1.5), r"noise_level=1.5.*in \[0, 1\]"),
        (lambda x: euler(x, x, torch.rand(2), 0.4), r"sigma has shape \(2,\)"),
        (lambda x: euler(x, x[:, :1], 0.5, 0.4), "latent shapes differ"),
        (lambda x: reference_kl_map(Transition(x, x, x), Transition(x, x, x), x, x, form="kl"), "form='kl'"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(latents(0)[0])
