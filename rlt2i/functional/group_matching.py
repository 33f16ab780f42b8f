"""Forward-process objectives that compare members of a group: DGPO, centred reward distillation (CRD)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .groups import group_mask, masked_mean
from .matching import adaptive_weight, credit_map
from .numerics import Scalar, check_same_shape, full_precision

CRDForm = Literal["mse", "bce"]


def dgpo_group_weight(
    error: Tensor,
    reference_error: Tensor,
    advantage: Tensor,
    group_size: int | Tensor,
    *,
    beta: float = 100.0,
    weight: Scalar = 1.0,
) -> Tensor:
    """DGPO's weight of a group, how far its preferences are still from being learned (arXiv 2510.08425).

        W_g = sigmoid( beta sum_{i in g} A_i mean_p[ w_ip (m_i - m_i^ref)_p ] / G )

    The noise of the errors must be shared within a group. Spatial weights sit inside the logit.

    Args:
        error: [B, H, W] flow-matching error of the policy.
        reference_error: [B, H, W] of the reference, same noise and sigma.
        advantage: [B].
        group_size: G for adjacent groups, or [B] integer group ids; groups must be whole.
        beta: strength.
        weight: mean-one; float, [B], or broadcastable to [B, H, W].

    Returns:
        [B] in (0, 1), one value per group, detached.
    """
    check_same_shape(error=error, reference_error=reference_error)
    gap = full_precision(error.detach()) - full_precision(reference_error.detach())
    pull = advantage.detach().to(gap) * (credit_map(weight, gap, name="weight") * gap).flatten(1).mean(dim=1)
    groups, mask = group_mask(group_size, pull, None)
    mean_pull = masked_mean(groups.split(pull), mask, 1)
    return groups.merge(torch.sigmoid(beta * mean_pull).expand_as(groups.rows))


def dgpo_clipped(error: Tensor, old_error: Tensor, advantage: Tensor, *, clip_range: float) -> Tensor:
    """Which samples are so far from the old policy that DGPO stops their gradient (arXiv 2510.08425).

        rho = exp(m_old - m);   A > 0: rho > 1 + eps,   otherwise: rho < 1 - eps

    Args:
        error: [B, H, W] flow-matching error of the policy.
        old_error: [B, H, W] of the old policy (DGPO: its moving reference), same noise and sigma.
        advantage: [B].
        clip_range: eps; 5e-2 to 1e-5 in the published recipes.

    Returns:
        [B] bool; pass `torch.where(clipped[:, None, None], error.detach(), error)` on.
    """
    check_same_shape(error=error, old_error=old_error)
    gap = full_precision(old_error.detach()) - full_precision(error.detach())
    ratio = torch.exp(gap.flatten(1).mean(dim=1))
    return torch.where(advantage > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)


def dgpo_loss_map(error: Tensor, advantage: Tensor, group_weight: Tensor, *, weight: Scalar = 1.0) -> Tensor:
    """DGPO's loss per location, L_p = w_p W_g A m_p (arXiv 2510.08425); published is its mean.

    Args:
        error: [B, H, W] flow-matching error; gradients flow.
        advantage: [B], or broadcastable to [B, H, W].
        group_weight: [B] from `dgpo_group_weight`.
        weight: mean-one; float, [B], or broadcastable to [B, H, W].

    Returns:
        [B, H, W].
    """
    error = full_precision(error)
    strength = credit_map(group_weight, error, name="group_weight") * credit_map(advantage, error, name="advantage")
    return credit_map(weight, error, name="weight") * strength * error


def crd_reward_map(v: Tensor, v_old: Tensor, x0: Tensor, noise: Tensor, *, adaptive: bool = True) -> Tensor:
    """CRD's implicit reward per location: how much better than the old policy v fits (arXiv 2603.14128).

        r_p = -mean_C[ (v - v*)^2 / w - (v_old - v*)^2 / w_old ]
        w   = max(mean_D |v - v*|, 1e-5)  per sample, without gradient

    Args:
        v: [B, C, H, W] velocity of the policy; gradients flow.
        v_old: [B, C, H, W]; detached.
        x0: [B, C, H, W] clean latents.
        noise: [B, C, H, W].
        adaptive: divide by w; otherwise w = 1.

    Returns:
        [B, H, W]; the reward of a sample is its mean over space.
    """
    check_same_shape(v=v, v_old=v_old, x0=x0, noise=noise)
    target = full_precision(noise) - full_precision(x0)
    residual, old_residual = full_precision(v) - target, full_precision(v_old.detach()) - target
    error, old_error = (residual**2).mean(dim=1), (old_residual**2).mean(dim=1)
    if adaptive:
        error, old_error = error / adaptive_weight(residual), old_error / adaptive_weight(old_residual)
    return old_error - error


def crd_pool(label: Tensor, group_size: int | Tensor, *, temperature: float) -> Tensor:
    """The samples that CRD centres on, as weights that sum to 1 in each group: softmax(a / temperature).

    Args:
        label: [B] in [0, 1], from `nft_label`.
        group_size: G for adjacent groups, or [B] integer group ids.
        temperature: infinite is the plain mean; positive prefers high labels, negative low ones, and the
            closer to 0 the more.

    Returns:
        [B], detached.

    Raises:
        ValueError: for a temperature of 0.
    """
    if temperature == 0:
        raise ValueError("temperature=0: use a small positive or negative temperature, or math.inf for the mean.")
    label = full_precision(label.detach())
    groups, mask = group_mask(group_size, label, None)
    logits = torch.where(mask, groups.split(label / temperature), -torch.inf)
    return groups.merge(torch.softmax(logits, dim=1))


def crd_centred_loss(
    reward: Tensor,
    label: Tensor,
    pool: Tensor,
    group_size: int | Tensor,
    *,
    beta: float = 1.0,
    form: CRDForm = "mse",
) -> Tensor:
    """Regress centred implicit rewards on centred labels (CRD, arXiv 2603.14128), per sample.

        r_c = r - sum_j q_j r_j (detached),   a_c = a - sum_j q_j a_j
        mse: (beta r_c - a_c)^2      bce: cross-entropy of sigmoid(beta r_c) against sigmoid(a_c)

    The sums run over the sample's group. CRD's public code centres on the whole gathered micro-batch instead:
    pass the batch size as `group_size` for that. The published loss is the mean over samples times adv_clip /
    beta.

    Args:
        reward: [B] implicit reward, the spatial mean of `crd_reward_map`; gradients flow.
        label: [B] in [0, 1].
        pool: [B] from `crd_pool`.
        group_size: G for adjacent groups, or [B] integer group ids.
        beta: scale of the implicit reward.
        form: "mse" or "bce".

    Returns:
        [B].

    Raises:
        ValueError: for an unknown form.
    """
    reward = full_precision(reward)
    label, pool = label.detach().to(reward), pool.detach().to(reward)
    groups, mask = group_mask(group_size, reward, None)

    def centre(values: Tensor) -> Tensor:
        share = torch.where(mask, groups.split(pool * values), 0).sum(dim=1, keepdim=True)
        return groups.merge(share.expand_as(groups.rows))

    centred_reward = reward - centre(reward.detach())
    centred_label = label - centre(label)
    if form == "mse":
        return (beta * centred_reward - centred_label) ** 2
    if form == "bce":
        target = torch.sigmoid(centred_label)
        return F.binary_cross_entropy_with_logits(beta * centred_reward, target, reduction="none")
    raise ValueError(f"form={form!r}: unknown loss. Use 'mse' or 'bce'.")


def crd_loss(
    reward: Tensor,
    label: Tensor,
    group_size: int | Tensor,
    *,
    beta: float = 1.0,
    temperature: float = math.inf,
    form: CRDForm = "mse",
) -> Tensor:
    """CRD's loss (arXiv 2603.14128), centred on the group's mean, or on its good and its bad samples in turn.

    Args:
        reward: [B] implicit reward; gradients flow.
        label: [B] in [0, 1].
        group_size: G for adjacent groups, or [B] integer group ids; the batch size centres on the whole
            batch.
        beta: scale of the implicit reward.
        temperature: infinite for the mean; finite for the two-sided form with softmax(+-a / temperature).
        form: "mse" or "bce".

    Returns:
        [B].

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature={temperature}: use math.inf to centre on the mean, or a positive number for both sides. "
            "(The published 'hard' mode looks for labels below 0 in [0, 1] and never finds any.)"
        )
    sides = (temperature,) if math.isinf(temperature) else (temperature, -temperature)
    losses = [
        crd_centred_loss(reward, label, crd_pool(label, group_size, temperature=side), group_size, beta=beta, form=form)
        for side in sides
    ]
    return torch.stack(losses).mean(dim=0)


def crd_kl_weight(label: Tensor, *, kl_beta: float, base: float = 1e-4) -> Tensor:
    """CRD's reward-adaptive anchor (arXiv 2603.14128): how much of the KL term a sample of label a gets.

        coefficient = m + a (1 - m),   m = base / kl_beta,   to be multiplied by kl_beta mean_D (v - v_ref)^2

    Good samples are held to the reference with the full kl_beta, bad ones with `base` only.

    Args:
        label: [B] in [0, 1].
        kl_beta: strength for a = 1.
        base: strength for a = 0.

    Returns:
        [B].

    Raises:
        ValueError: for a `kl_beta` that is not positive.
    """
    if kl_beta <= 0:
        raise ValueError(f"kl_beta={kl_beta}: without an anchor there is nothing to adapt. Use a positive number.")
    least = base / kl_beta
    return least + full_precision(label) * (1 - least)
