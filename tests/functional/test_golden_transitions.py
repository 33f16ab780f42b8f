"""Golden cases: transition kernels, log-probs and their gradients, whole rollouts, solvers, DDIM."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlt2i.functional.epsilon import scaled_linear_alpha_bars
from rlt2i.functional.gaussian import LOG_SQRT_2PI, cps_log_prob_map, log_prob_map
from rlt2i.functional.schedules import sd3_sigmas
from rlt2i.functional.solvers import dpm_solver_2m
from rlt2i.functional.transitions import Transition, clean_prediction, cps, dance_sde, euler, flow_ddim, flow_sde
from tests.helpers.golden_cases import Case, golden, per_sample_mean
from tests.helpers.published_steps import ddim, ddim_previous_timestep, dpm_solver_1, shifted_linspace_sigmas


def schedule(case: Case, dtype: torch.dtype) -> Tensor:
    """The float32 schedule that the reference used, upcast if need be."""
    make = shifted_linspace_sigmas if "linspace" in case.get("schedule", "") else sd3_sigmas
    return make(case["num_steps"], shift=case["shift"]).to(dtype)


def step(case: Case, v: Tensor, dtype: torch.dtype, *, algo: str | None = None, level: Any = None) -> Transition:
    """The case's transition for a velocity `v`."""
    sigmas = schedule(case, dtype)
    index = torch.as_tensor(case["step"])
    x = case.tensor("x", dtype)
    now, then = sigmas[index], sigmas[index + 1]
    level = case.get("noise_level", case.get("eta")) if level is None else level
    match algo or case.record["algo"]:
        case "flow_sde":
            return flow_sde(x, v, now, then, sigma_max=sigmas[1], noise_level=level)
        case "dance_sde":
            return dance_sde(x, v, now, then, eta=level)
        case "cps":
            return cps(x, v, now, then, noise_level=level)
        case "flow_ddim":
            return flow_ddim(x, v, now, then, eta=level)
        case "ode":
            return euler(x, v, now, then)
        case other:
            raise AssertionError(f"{case.name}: no kernel for {other}")


def log_prob(case: Case, x_next: Tensor, transition: Transition) -> Tensor:
    """[B] log-prob as the peers define it for the case's kernel."""
    if case.record["algo"] == "cps":
        return per_sample_mean(cps_log_prob_map(x_next, transition.mean))
    return per_sample_mean(log_prob_map(x_next, transition.mean, transition.std))


def check_outputs(case: Case, expected: dict[str, Any], dtype: torch.dtype, tol: str | None) -> None:
    v = case.tensor("v", dtype).requires_grad_()
    # Flow-Factory's noise level goes through float32, which shows in float64.
    level = case.get("noise_level", case.get("eta"))
    if "flow_factory" in case.name and dtype == torch.float64 and level is not None:
        level = float(torch.tensor(level, dtype=torch.float32))
    transition = step(case, v, dtype, level=level)
    x_next = case.tensor("x_next", dtype)
    value = log_prob(case, x_next, transition)
    sigmas, index = schedule(case, dtype), torch.as_tensor(case["step"])
    dt = (sigmas[index + 1] - sigmas[index]).expand(len(v))
    # verl returns the full std for Dance-SDE, everyone else s (which is the full std for CPS).
    scale = transition.std if "verl/dance" in case.name else transition.scale
    noisy = transition.std.flatten() > 0
    normaliser = torch.where(noisy, torch.log(transition.std.flatten()) + LOG_SQRT_2PI, 0)
    if case.record["algo"] == "cps":
        normaliser = torch.zeros_like(normaliser)
    (gradient,) = torch.autograd.grad(value.sum(), v)
    ours = {
        "log_prob": value.detach(),
        "log_prob_no_normalizer": (value + normaliser).detach(),
        "prev_sample_mean": transition.mean.detach(),
        "next_latents_mean": transition.mean.detach(),
        "mean": transition.mean.detach(),
        "std_dev_t": scale.flatten(),
        "sqrt_neg_dt": (-dt).sqrt(),
        "dt": dt,
        "grad_sum_log_prob_wrt_v": gradient,
        "pred_x0": clean_prediction(case.tensor("x", dtype), v.detach(), sigmas[index]),
    }
    assert expected.keys() <= ours.keys(), f"{case.name}: unknown outputs {expected.keys() - ours.keys()}"
    for key in expected:
        if "log_prob" in key:
            case.expect_or_nothing(key, ours[key], within=expected, tol=tol)
        else:
            case.expect(key, ours[key], within=expected, tol=tol)


@golden(
    "sde/*",
    without=("*/sample", "*/bf16_roundtrip", "*current_sde_steps", "sde/dance_flux*", "sde/mix*"),
)
def test_kernel(case: Case):
    check_outputs(case, case.outputs, torch.float32, None)
    if case.outputs_f64:
        check_outputs(case, case.outputs_f64, torch.float64, "f64")


@golden("sde/*/sample")
def test_sampled_step(case: Case):
    transition = step(case, case.tensor("v"), torch.float32)
    x_next = transition.mean + transition.std * case.tensor("noise")
    case.expect("x_next", x_next)
    case.expect("prev_sample_mean", transition.mean)
    case.expect("std_dev_t", transition.scale.flatten())
    case.expect("log_prob", log_prob(case, x_next, transition))


@golden("sde/*/bf16_roundtrip")
def test_log_prob_of_the_stored_bfloat16_sample(case: Case):
    sigmas, index = schedule(case, torch.float32), case["step"]
    x = case.tensor("x_bf16", torch.bfloat16)
    transition = flow_sde(
        x.float(),
        case.tensor("v"),
        sigmas[index],
        sigmas[index + 1],
        sigma_max=sigmas[1],
        noise_level=case["noise_level"],
    )
    x_next = (transition.mean + transition.std * case.tensor("noise")).to(torch.bfloat16)
    case.expect("x_next", x_next.float())
    case.expect("log_prob", log_prob(case, x_next, transition))


@golden("sde/dance_flux_step/*")
def test_dance_flux_step(case: Case):
    check_outputs(case, case.outputs["sde"], torch.float32, None)
    # DanceGRPO's other branch omits the score: an Euler mean with Dance-SDE's std.
    v = case.tensor("v").requires_grad_()
    sigmas, index = schedule(case, torch.float32), case["step"]
    mean = euler(case.tensor("x"), v, sigmas[index], sigmas[index + 1]).mean
    value = log_prob(case, case.tensor("x_next"), step(case, v, torch.float32)._replace(mean=mean))
    (gradient,) = torch.autograd.grad(value.sum(), v)
    expected = case.outputs["no_score_term"]
    case.expect("mean", mean.detach(), within=expected)
    case.expect("log_prob", value.detach(), within=expected)
    case.expect("grad_sum_log_prob_wrt_v", gradient, within=expected)
    case.expect("pred_x0", clean_prediction(case.tensor("x"), v.detach(), sigmas[index]), within=expected)


@golden("sde/mix_flow_grpo_step/*")
def test_mixgrpo_flow_step(case: Case):
    v = case.tensor("v")
    transition = step(case, v, torch.float32)
    case.expect("mean", transition.mean)
    case.expect("log_prob", log_prob(case, case.tensor("x_next"), transition))
    case.expect("std_full", transition.std[0, 0, 0, 0])
    sigmas, index = schedule(case, torch.float32), case["step"]
    case.expect("deterministic_x_next", euler(case.tensor("x"), v, sigmas[index], sigmas[index + 1]).mean)


@golden("sde/mix_dance_step/*", "solver/nft/dance_grpo_step/*")
def test_dance_step_without_normaliser(case: Case):
    # MixGRPO and NFT lose the normaliser to a stray statement: a constant, ours keeps it.
    transition = step(case, case.tensor("v"), torch.float32)
    x_next = case.tensor("x_next")
    normaliser = torch.log(transition.std).flatten() + LOG_SQRT_2PI
    case.expect("log_prob", log_prob(case, x_next, transition) + normaliser)
    if "pred_x0" in case.outputs:
        sigma = schedule(case, torch.float32)[case["step"]]
        case.expect("pred_x0", clean_prediction(case.tensor("x"), case.tensor("v"), sigma))
        case.expect("x_next", x_next)


@golden("solver/nft/ddim_step/*")
def test_flow_ddim_step(case: Case):
    v = case.tensor("v")
    transition = step(case, v, torch.float32, algo="flow_ddim")
    drawn = transition.mean + transition.std * case.tensor("noise")
    x_next = drawn if case["x_next"] is None else case.tensor("x_next")
    case.expect("x_next", x_next)
    case.expect_or_nothing("log_prob", log_prob(case, x_next, transition))
    sigma = schedule(case, torch.float32)[case["step"]]
    case.expect("pred_x0", clean_prediction(case.tensor("x"), v, sigma))


def toy_velocity(z: Tensor, sigma: Tensor) -> Tensor:
    return 0.5 * z + 0.25 * sigma - 0.1 * torch.sin(z)


@golden("solver/nft/*/deterministic")
def test_solver(case: Case):
    assert case["velocity"] == "0.5*z + 0.25*sigma - 0.1*sin(z)"
    solver = case.name.split("/")[2]
    sigmas = schedule(case, torch.float32)
    z = case.tensor("x")
    means = [z.mean()]
    previous, sigma_previous = torch.zeros_like(z), torch.tensor(1.0)
    for now, then in pairwise(sigmas):
        v = toy_velocity(z, now)
        clean = clean_prediction(z, v, now)
        if solver == "flow":
            z = euler(z, v, now, then).mean
        elif solver == "ddim":
            z = flow_ddim(z, v, now, then, eta=0.0).mean
        elif solver == "dpm1":
            z = dpm_solver_1(z, v, now, then)
        elif solver == "dpm2":
            z = dpm_solver_2m(z, v, now, then, previous_clean=previous, sigma_previous=sigma_previous)
        elif solver == "dance":
            z = dance_sde(z, v, now, then, eta=0.0).mean
        else:
            raise AssertionError(solver)
        previous, sigma_previous = clean, now
        means.append(z.mean())
    case.expect("final", z)
    case.expect("trajectory_mean", torch.stack(means))


def check_rollout(case: Case, expected: dict[str, Any], dtype: torch.dtype, tol: str | None) -> None:
    assert case["velocity"] == "0.5*z + 0.25*sigma - 0.1*sin(z)"
    sigmas, noise = schedule(case, dtype), case.tensor("noise", dtype)
    z, log_probs, means = case.tensor("x_init", dtype), [], []
    for index, (now, then) in enumerate(pairwise(sigmas)):
        v = toy_velocity(z, now)
        level = case["noise_level"] if index in case["sde_steps"] else 0.0
        if case["sde_type"] == "cps":
            transition = cps(z, v, now, then, noise_level=level)
        else:
            transition = flow_sde(z, v, now, then, sigma_max=sigmas[1], noise_level=level)
        z_next = transition.mean + transition.std * noise[index]
        if case["sde_type"] == "cps":
            value = cps_log_prob_map(z_next, transition.mean)
        else:
            value = log_prob_map(z_next, transition.mean, transition.std)
        if level > 0:
            log_probs.append(per_sample_mean(value))
        z = z_next
        means.append(z.mean())
    case.expect("final", z, within=expected, tol=tol)
    case.expect("log_probs", torch.stack(log_probs, dim=1), within=expected, tol=tol)
    case.expect("mean_after_step", torch.stack(means), within=expected, tol=tol)


@golden("rollout/*")
def test_rollout(case: Case):
    check_rollout(case, case.outputs, torch.float32, None)
    check_rollout(case, case.outputs_f64, torch.float64, "f64")


@golden("ddpo/*")
def test_ddim_with_log_prob(case: Case):
    scheduler = case["scheduler"]
    assert scheduler["beta_schedule"] == "scaled_linear"
    assert scheduler["prediction_type"] == "epsilon"
    alpha_bars = scaled_linear_alpha_bars(
        num_train_timesteps=scheduler["num_train_timesteps"],
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
    )
    timestep = torch.tensor(case["t"])
    now, then = alpha_bars[timestep], alpha_bars[ddim_previous_timestep(timestep, num_steps=case["num_steps"])]
    epsilon = case.tensor("eps_pred").requires_grad_()
    transition = ddim(case.tensor("x"), epsilon, now, then, eta=case["eta"])
    value = per_sample_mean(log_prob_map(case.tensor("x_next"), transition.mean, transition.std))
    (gradient,) = torch.autograd.grad(value.sum(), epsilon)
    case.expect("alpha_bar_t", now)
    case.expect("alpha_bar_prev", then)
    case.expect("variance", (transition.std / case["eta"]).flatten() ** 2)
    case.expect("x_next_sampled", (transition.mean + transition.std * case.tensor("noise")).detach())
    case.expect("log_prob", value.detach())
    case.expect("grad_sum_log_prob_wrt_eps", gradient)


def test_the_float32_constant():
    assert torch.tensor(math.log(math.sqrt(2 * math.pi)), dtype=torch.float32).item() == LOG_SQRT_2PI
