"""Regression targets that a reward has moved: the velocity or the clean prediction that the policy is fitted to.

Targets are constants; gradients flow into the policy's own velocity alone. Losses keep their space axes, [B, H, W].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .matching import adaptive_weight, credit_map, nft_branches
from .numerics import Scalar, check_same_shape, full_precision, per_sample


def reinforce_adjoint_target(v: Tensor, v_reference: Tensor, x0: Tensor, noise: Tensor, advantage: Scalar) -> Tensor:
    """Reinforce Adjoint Matching's target (arXiv 2605.10759, eq. 17): the pretraining target, corrected by the reward.

        v* = sg( v_ref + A ((eps - x0) - v) )

    The policy's own residual takes it towards samples with A > 0 and away from those with A < 0, and the reference
    holds it: where the policy reproduces v*, it is that of the reward-tilted distribution to first order. No
    likelihood and no gradient of the reward are needed.

    Args:
        v: [B, C, H, W] velocity of the policy at x_sigma.
        v_reference: [B, C, H, W] of the reference policy there.
        x0: [B, C, H, W] clean latents that the policy made.
        noise: [B, C, H, W].
        advantage: reward in units of the KL's temperature; float, [B], or broadcastable to [B, H, W].

    Returns:
        [B, C, H, W], detached.
    """
    check_same_shape(v=v, v_reference=v_reference, x0=x0, noise=noise)
    v, x0, noise = full_precision(v).detach(), full_precision(x0), full_precision(noise)
    advantage = credit_map(advantage, v[:, 0], name="advantage")[:, None]
    return full_precision(v_reference).detach() + advantage * (noise - x0 - v)


class RewardTargets(NamedTuple):
    """Where a reward pulls a clean prediction, and where it pushes it from; both [B, C, H, W] and detached."""

    better: Tensor
    worse: Tensor


def gradient_targets(anchor: Tensor, gradient: Tensor, *, radius: float) -> RewardTargets:
    """DiffusionOPSD's targets (arXiv 2608.24646): one step along the reward's gradient, and one against it.

        y+- = y0 +- h g / |g|,   h = radius |y0|

    The step is a share of the anchor's own norm, so that a steep reward moves no further than a flat one.

    Args:
        anchor: [B, C, H, W] clean predictions y0 of the policy that collected the data.
        gradient: [B, C, H, W] of each reward with respect to its anchor; where it vanishes the targets are the anchor.
        radius: share of |y0|.

    Returns:
        RewardTargets.
    """
    check_same_shape(anchor=anchor, gradient=gradient)
    anchor, gradient = full_precision(anchor).detach(), full_precision(gradient).detach()
    norm = lambda x: torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    size = norm(gradient)
    step = radius * norm(anchor) * torch.where(size > 0, gradient / torch.where(size > 0, size, 1), 0)
    return RewardTargets(anchor + step, anchor - step)


def self_distillation_loss_map(
    v: Tensor,
    v_old: Tensor,
    x: Tensor,
    sigma: Scalar,
    targets: RewardTargets,
    label: Scalar,
    *,
    beta: float,
    clip: float,
    weight: Scalar = 1.0,
) -> Tensor:
    """DiffusionOPSD's loss (arXiv 2608.24646): DiffusionNFT's branches, fitted to targets that the reward has moved.

        L = clip ( r mean_C (y+_theta - y+)^2 / g+ + (1 - r) mean_C (y-_theta - y-)^2 / g- )
        y+-_theta = x - sigma v+-,   v+- as in `nft_branches`,   g+- the adaptive weight of their residuals

    Args:
        v: [B, C, H, W] velocity of the policy at the rollout's own state; gradients flow.
        v_old: [B, C, H, W] of the policy that collected the data.
        x: [B, C, H, W] the state.
        sigma: float or [B], its noise level.
        targets: of `gradient_targets` around y0 = x - sigma v_old.
        label: r in [0, 1], [B], or broadcastable to [B, H, W].
        beta: mixing strength of the branches.
        clip: the advantage clip behind the label; only scales the loss.
        weight: non-negative; float, [B], or broadcastable to [B, H, W].

    Returns:
        [B, H, W].
    """
    positive, negative = nft_branches(v, v_old, beta=beta)
    x = full_precision(x)
    sigma = per_sample(sigma, x, name="sigma")
    errors = []
    for branch, target in zip((positive, negative), targets, strict=True):
        residual = x - sigma * branch - target
        errors.append((residual**2).mean(dim=1) / adaptive_weight(residual))
    label = credit_map(label, errors[0], name="label")
    weight = credit_map(weight, errors[0], name="weight")
    return weight * clip * (label * errors[0] + (1 - label) * errors[1])
