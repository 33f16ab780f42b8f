"""Golden cases: policy-gradient losses and their gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlt2i.functional.gaussian import kl_map, log_prob_map, reference_kl_map
from rlt2i.functional.surrogate import SurrogateLoss, clipped_surrogate, flow_dppo_surrogate, grpo_guard_log_ratio
from rlt2i.functional.transitions import flow_sde
from tests.functional.test_golden_transitions import step
from tests.helpers.golden_cases import Case, golden, per_sample_mean


def gradient_of(loss: Tensor, v: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, v, retain_graph=True)
    return gradient


def sample_log_prob(case: Case, v: Tensor, dtype: torch.dtype) -> Tensor:
    transition = step(case, v, dtype, algo="flow_sde")
    return per_sample_mean(log_prob_map(case.tensor("x_next", dtype), transition.mean, transition.std))


def both_precisions(case: Case, check: Callable[[Case, dict[str, Any], torch.dtype, str | None], None]) -> None:
    check(case, case.outputs, case.dtype, None)
    if case.outputs_f64:
        check(case, case.outputs_f64, torch.float64, "f64")


@golden("loss/flow_grpo/*")
def test_flow_grpo(case: Case):
    def check(case: Case, expected: dict[str, Any], dtype: torch.dtype, tol: str | None) -> None:
        v = case.tensor("v", dtype).requires_grad_()
        transition = step(case, v, dtype, algo="flow_sde")
        log_prob = sample_log_prob(case, v, dtype)
        if case["old_log_prob_shift"] is None:
            old_log_prob = sample_log_prob(case, case.tensor("v_old", dtype), dtype)
        else:
            old_log_prob = log_prob.detach() - case.tensor("old_log_prob_shift", dtype)
        advantage = case.tensor("adv", dtype).clamp(-case["adv_clip_max"], case["adv_clip_max"])
        surrogate = clipped_surrogate(log_prob - old_log_prob, advantage, case["clip_range"])
        v_ref = case.tensor("v_ref", dtype)
        reference = step(case, v_ref, dtype, algo="flow_sde")
        kl = reference_kl_map(transition, reference, v, v_ref, form="flow_grpo").mean()
        loss = surrogate.loss.mean() + case["beta"] * kl
        ours = {
            "log_prob": log_prob.detach(),
            "old_log_prob": old_log_prob,
            "ratio": surrogate.ratio,
            "policy_loss": surrogate.loss.mean().detach(),
            "kl_loss": kl.detach(),
            "loss": loss.detach(),
            "grad_v": gradient_of(loss, v),
        }
        for key in expected:
            case.expect(key, ours[key], within=expected, tol=tol)

    both_precisions(case, check)


@golden("loss/grpo_clip/*", "loss/verl_grpo/*")
def test_clip_alone(case: Case):
    log_prob = case.tensor("log_prob").requires_grad_()
    advantage = case.tensor("adv").clamp(-case["adv_clip_max"], case["adv_clip_max"])
    surrogate = clipped_surrogate(log_prob - case.tensor("old_log_prob"), advantage, case["clip_range"])
    loss = surrogate.loss.mean()
    case.expect("loss", loss.detach())
    case.expect("grad_log_prob", gradient_of(loss, log_prob))
    if "ratio" in case.outputs:
        case.expect("ratio", surrogate.ratio)


@golden("kl/flow_grpo_vs_verl")
def test_kl(case: Case):
    kl = kl_map(case.tensor("mu"), case.tensor("mu_ref"), case.tensor("std_dev_t")).mean()
    for key in case.outputs:
        case.expect(key, kl)


@golden("loss/grpo_guard/*")
def test_grpo_guard(case: Case):
    def check(case: Case, expected: dict[str, Any], dtype: torch.dtype, tol: str | None) -> None:
        v, v_old = case.tensor("v", dtype).requires_grad_(), case.tensor("v_old", dtype)
        transition = step(case, v, dtype, algo="flow_sde")
        old = step(case, v_old, dtype, algo="flow_sde")
        x_next = case.tensor("x_next", dtype)
        old_map = log_prob_map(x_next, old.mean, old.std)
        log_ratio = log_prob_map(x_next, transition.mean, transition.std) - old_map
        step_size = (transition.std[0, 0, 0, 0] / transition.scale[0, 0, 0, 0]) ** 2
        advantage = case.tensor("adv", dtype).clamp(-case["adv_clip_max"], case["adv_clip_max"])
        case.expect("old_log_prob", per_sample_mean(old_map), within=expected, tol=tol)

        def surrogate(bias: str) -> SurrogateLoss:
            guarded = grpo_guard_log_ratio(log_ratio, transition.mean, old.mean, transition.std, bias=bias)
            return clipped_surrogate(per_sample_mean(guarded), advantage, case["clip_range"])

        # flow_grpo removes the bias of the whole batch; verl that of each sample, as the paper; Flow-Factory too,
        # but it neither divides by -dt nor keeps its ratio a vector ([B,1,1,1] x [B]; harmless at one common
        # timestep).
        for peer, bias, scale in (
            ("flow_grpo_new", "batch", step_size),
            ("verl", "sample", step_size),
            ("flow_factory", "sample", 1.0),
        ):
            result = surrogate(bias)
            loss = result.loss.mean() / scale
            case.expect("loss", loss.detach(), within=expected[peer], tol=tol)
            case.expect("grad_v", gradient_of(loss, v), within=expected[peer], tol=tol)
            if peer == "flow_grpo_new":
                case.expect("ratio", result.ratio, within=expected[peer], tol=tol)
            if peer == "flow_factory":
                case.expect("ratio", result.ratio.expand(3, 1, 1, 3), within=expected[peer], tol=tol)

    both_precisions(case, check)


@golden("loss/verl_flow_dppo/*")
def test_flow_dppo(case: Case):
    v, v_old = case.tensor("v").requires_grad_(), case.tensor("v_old")
    transition, old = (step(case, value, case.dtype, algo="flow_sde") for value in (v, v_old))
    log_ratio = sample_log_prob(case, v, case.dtype) - sample_log_prob(case, v_old, case.dtype)
    divergence = per_sample_mean(kl_map(transition.mean, old.mean, transition.std))
    surrogate = flow_dppo_surrogate(log_ratio, case.tensor("adv"), divergence, case["kl_mask_threshold"])
    loss = surrogate.loss.mean()
    masked = surrogate.clipped_high | surrogate.clipped_low
    ours = {
        "loss": loss.detach(),
        "grad_v": gradient_of(loss, v),
        "ppo_kl": -log_ratio.mean().detach(),
        "approx_kl": 0.5 * (log_ratio**2).mean().detach(),
        "ratio_mean": surrogate.ratio.mean(),
        "ratio_std": surrogate.ratio.std(correction=0),
        "ratio_min": surrogate.ratio.min(),
        "ratio_max": surrogate.ratio.max(),
        "kl_new_old_mean": divergence.mean().detach(),
        "kl_new_old_max": divergence.max().detach(),
        "kl_mask_fraction": (divergence >= case["kl_mask_threshold"]).float().mean(),
        "pos_rm_fraction": surrogate.clipped_high.float().mean(),
        "neg_rm_fraction": surrogate.clipped_low.float().mean(),
        "masked_fraction": masked.float().mean(),
        "unmasked_fraction": (~masked).float().mean(),
    }
    for key in case.outputs:
        case.expect(key, ours[key])


def test_on_policy_ratio_is_exactly_one():
    # Bit-equal, not merely close: the first update of a batch must not be clipped by rounding.
    generator = torch.Generator().manual_seed(0)
    x, v, noise = (torch.randn(2, 4, 6, 6, generator=generator) for _ in range(3))
    transition = flow_sde(x, v, 0.7, 0.6, sigma_max=0.96, noise_level=0.7)
    value = log_prob_map(transition.mean + transition.std * noise, transition.mean, transition.std)
    assert (clipped_surrogate(value - value.detach(), torch.ones(2, 1, 1), 1e-5).ratio == 1).all()
