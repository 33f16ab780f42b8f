"""Golden cases: forward-process losses and their gradients."""

from typing import Any

import torch
from torch import Tensor

from rlt2i.functional import group_matching, matching
from rlt2i.functional.awm import awm_advantage, awm_kl_map, awm_log_likelihood, awm_noise_scale
from rlt2i.functional.gaussian import squared_error_map
from rlt2i.functional.preference import dpo_logits, dpo_loss
from rlt2i.functional.surrogate import clipped_surrogate
from tests.functional.test_golden_losses import both_precisions, gradient_of
from tests.helpers.golden_cases import Case, golden, per_sample_mean
from tests.helpers.published_advantages import awm_sum_first


@golden("loss/nft/*", "loss/verl_nft/*", "loss/flow_factory_nft/*")
def test_nft(case: Case):
    v, v_old = case.tensor("v").requires_grad_(), case.tensor("v_old")
    x0, noise, sigma = case.tensor("x0"), case.tensor("eps"), case.tensor("sigma")
    beta, clip = case["beta"], case["adv_clip_max"]
    if "reward_prob" in case:
        label = case.tensor("reward_prob")
    else:
        label = matching.nft_label(case.tensor("adv"), clip=clip, mode=case.get("adv_mode") or "all")
    policy_loss = matching.nft_loss_map(v, v_old, x0, noise, sigma, label, beta=beta, clip=clip).mean()
    loss = policy_loss
    ours = {"policy_loss": policy_loss.detach(), "r": label}
    if "v_ref" in case:
        kl = squared_error_map(v, case.tensor("v_ref")).mean()
        ours["kl"] = kl.detach()
        loss = loss + case["kl_beta"] * kl
    x_sigma, time = matching.noised(x0, noise, sigma), sigma[:, None, None, None]
    for sign, branch in zip(("pos", "neg"), matching.nft_branches(v, v_old, beta=beta), strict=True):
        residual = (x_sigma - time * branch - x0).detach()
        ours[f"weight_{sign}"] = matching.adaptive_weight(residual).flatten()
        name = {"pos": "positive_loss", "neg": "negative_loss"}[sign]
        ours[name] = per_sample_mean(matching.nft_branch_error(branch, x0, noise, sigma)).detach()
    ours["loss"] = loss.detach()
    ours["grad_v"] = gradient_of(loss, v)
    if case.name.startswith("loss/nft/"):
        # NFT adds the KL in place, so the tensor it reports as policy loss is the total by then.
        ours["policy_loss"] = ours["loss"]
    for key in case.outputs:
        case.expect(key, ours[key])


AWM_NAMES = {"Uniform": "uniform", "t": "t", "t**2": "t2", "huber": "huber", "ghuber": "ghuber", "ELBO": "elbo"}


@golden("awm/log_prob/*")
def test_awm_log_likelihood(case: Case):
    v, t = case.tensor("v").requires_grad_(), case.tensor("t")
    error = per_sample_mean(matching.flow_matching_error(v, case.tensor("x0"), case.tensor("eps")))
    value = awm_log_likelihood(error, t, weighting=AWM_NAMES[case["weighting"]], power=case["ghuber_power"])
    case.expect("log_prob", value.detach())
    case.expect("std_dev_t", awm_noise_scale(t))
    case.expect("grad_sum_log_prob_wrt_v", gradient_of(value.sum(), v))
    case.expect("flow_factory_float32", value.detach().float(), tol="f32_logp")


@golden("awm/loss/*")
def test_awm_loss(case: Case):
    v, t = case.tensor("v").requires_grad_(), case.tensor("t")

    def log_likelihood(velocity: Tensor) -> Tensor:
        error = per_sample_mean(matching.flow_matching_error(velocity, case.tensor("x0"), case.tensor("eps")))
        name = AWM_NAMES[case["weighting"]]
        return awm_log_likelihood(error, t, weighting=name, power=case["ghuber_power"])

    advantage = awm_advantage(case.tensor("adv"), clip=case["adv_clip_max"], scale=case["advantage_max"])
    log_ratio = log_likelihood(v) - log_likelihood(case.tensor("v_old"))
    times = len(t) // len(advantage)  # (T * B), t-major
    if case["loss_type"] == "sum_first":
        log_ratio = awm_sum_first(log_ratio, times)
    else:
        advantage = advantage.repeat(times)
    surrogate = clipped_surrogate(log_ratio, advantage, case["clip_range"])
    policy_loss = surrogate.loss.mean()
    kl = awm_kl_map(v, case.tensor("v_ref"), t, weighting=AWM_NAMES[case["kl_weight"]]).mean()
    loss = policy_loss + case["beta"] * kl
    ours = {"policy_loss": policy_loss.detach(), "kl_loss": kl.detach(), "ratio": surrogate.ratio}
    if case["ema_beta"] > 0:
        ema_kl = awm_kl_map(v, case.tensor("v_ema"), t, weighting=AWM_NAMES[case["kl_ema_weight"]]).mean()
        loss = loss + case["ema_beta"] * ema_kl
        ours["ema_kl_loss"] = ema_kl.detach()
    ours["loss"] = loss.detach()
    ours["grad_v"] = gradient_of(loss, v)
    for key, expected in case.outputs.items():
        if expected is not None:
            case.expect(key, ours[key])


@golden("loss/dpo/*")
def test_dpo(case: Case):
    def check(case: Case, expected: dict[str, Any], dtype: torch.dtype, tol: str | None) -> None:
        v_w, v_l = (case.tensor(key, dtype).requires_grad_() for key in ("v_w", "v_l"))
        noise = case.tensor("eps", dtype)

        def error(v: Tensor, x0: str) -> Tensor:
            return matching.flow_matching_error(v, case.tensor(x0, dtype), noise)

        logits = dpo_logits(
            error(v_w, "x_w"),
            error(v_l, "x_l"),
            error(case.tensor("ref_w", dtype), "x_w"),
            error(case.tensor("ref_l", dtype), "x_l"),
            beta=case["beta"],
        )
        loss = dpo_loss(logits).mean()
        for key in ("loss", "flow_factory_loss", "verl_loss"):
            case.expect(key, loss.detach(), within=expected, tol=tol)
        case.expect("inside_term", logits.detach(), within=expected, tol=tol)
        case.expect("grad_v_w", gradient_of(loss, v_w), within=expected, tol=tol)
        case.expect("grad_v_l", gradient_of(loss, v_l), within=expected, tol=tol)

    both_precisions(case, check)


@golden("loss/sft_rwr")
def test_sft_and_rwr(case: Case):
    v = case.tensor("v").requires_grad_()
    error = matching.flow_matching_error(v, case.tensor("x0"), case.tensor("eps"))
    july = matching.weighted_matching_loss_map(error, case.tensor("adv")[:, 0]).mean()
    kl = squared_error_map(v, case.tensor("v_ref")).mean()
    # With beta = 0 the November script forgets the advantage: a plain matching loss. Ours keeps it at every beta.
    losses = {"july_rwr_or_sft": july, "nov_beta0.1": july + 0.1 * kl, "nov_beta0.0": error.mean()}
    assert case.expected("weighting", within=case.outputs["july_rwr_or_sft"]) == [1.0] * len(error)  # no weighting
    for key, expected in case.outputs.items():
        case.expect("loss", losses[key].detach(), within=expected)
        case.expect("grad_v", gradient_of(losses[key], v), within=expected)


@golden("loss/dgpo/*")
def test_dgpo(case: Case):
    v = case.tensor("v").requires_grad_()
    x0, noise, advantage = case.tensor("x0"), case.tensor("eps"), case.tensor("adv")
    v_old, v_ref = case.tensor("v_old"), case.tensor("v_ref")
    error = matching.flow_matching_error(v, x0, noise)
    moving = case["ema_ref_as_dgpo_ref"]
    reference_error = matching.flow_matching_error(v_old if moving else v_ref, x0, noise)
    group_weight = group_matching.dgpo_group_weight(
        error, reference_error, advantage, torch.tensor(case["group"]), beta=case["beta_dpo"]
    )
    kl = squared_error_map(v, v_ref)
    if case["use_old"]:
        old_error = matching.flow_matching_error(v_old, x0, noise)
        clipped = group_matching.dgpo_clipped(error, old_error, advantage, clip_range=case["clip_range"])
        if "should_clip" in case.outputs:
            assert clipped.tolist() == case.expected("should_clip")
        error = torch.where(clipped[:, None, None], error.detach(), error)
        if case["clip_kl"]:
            kl = torch.where(clipped[:, None, None], kl.detach(), kl)
    dgpo_loss = group_matching.dgpo_loss_map(error, advantage, group_weight).mean()
    loss = dgpo_loss + case["kl_beta"] * kl.mean()
    assert case.expected("group_index") == case["group"]
    ours = {
        "loss": loss.detach(),
        "dgpo_loss": dgpo_loss.detach(),
        "kl_loss": kl.mean().detach(),
        "grad_v": gradient_of(loss, v),
        "flow_factory_dgpo_loss": dgpo_loss.detach(),
        "flow_factory_grad_v": gradient_of(dgpo_loss, v),
    }
    for key in case.outputs.keys() - {"group_index", "should_clip"}:
        case.expect(key, ours[key])


@golden("loss/crd/*")
def test_crd(case: Case):
    v = case.tensor("v").requires_grad_()
    reward = per_sample_mean(
        group_matching.crd_reward_map(
            v, case.tensor("v_old"), case.tensor("x0"), case.tensor("eps"), adaptive=case["adaptive_logp"]
        )
    )
    clip, beta, kl_beta, batch = case["adv_clip_max"], case["crd_beta"], case["kl_beta"], len(reward)
    label = matching.nft_label(case.tensor("adv"), clip=clip)
    temperature, form = case["weight_temp"], case["loss_type"]
    if temperature == 0:
        # The published "hard" mode centres half on softmax(a) over a > 0, which is everyone, and half on a < 0,
        # which is no one and falls back to the mean. Ours refuses temperature 0; these are the two pools it
        # amounts to.
        pools = (group_matching.crd_pool(label, batch, temperature=1.0), torch.full_like(label, 1 / batch))
        sides = [group_matching.crd_centred_loss(reward, label, pool, batch, beta=beta, form=form) for pool in pools]
        centred = torch.stack(sides).mean(dim=0)
    else:
        temperature = temperature if temperature > 0 else float("inf")
        centred = group_matching.crd_loss(reward, label, batch, beta=beta, temperature=temperature, form=form)
    policy_loss = centred.mean() * clip / beta
    kl = per_sample_mean(squared_error_map(v, case.tensor("v_ref")))
    if case["reward_adaptive_kl"]:
        kl = kl * group_matching.crd_kl_weight(label, kl_beta=kl_beta)
    loss = policy_loss + kl_beta * kl.mean()
    case.expect("r_theta", reward.detach())
    case.expect("policy_loss", policy_loss.detach())
    case.expect("kl_loss", kl_beta * kl.mean().detach())
    case.expect("loss", loss.detach())
    case.expect("grad_v", gradient_of(loss, v))
