"""Forward-process objectives: losses on x_sigma = (1 - sigma) x0 + sigma eps that need no trajectory.

Every loss keeps its space axes, [B, H, W] (mean over channels only), so that weight maps can enter; average
over space and batch to get the published number. Velocity targets are v* = eps - x0.
"""

from typing import Literal

import torch
from torch import Tensor

from .numerics import Scalar, check_broadcasts_into, check_same_shape, full_precision, per_sample

NFTMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]


def noised(x0: Tensor, noise: Tensor, sigma: Scalar) -> Tensor:
    """Forward process of a flow, x_sigma = (1 - sigma) x0 + sigma eps.

    Args:
        x0: [B, C, H, W] clean latents.
        noise: [B, C, H, W] standard normal.
        sigma: float or [B].

    Returns:
        [B, C, H, W].
    """
    check_same_shape(x0=x0, noise=noise)
    x0, noise = full_precision(x0), full_precision(noise)
    sigma = per_sample(sigma, x0, name="sigma")
    return (1 - sigma) * x0 + sigma * noise


def flow_matching_error(v: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Flow-matching error per location, e_p = mean_C (v - (eps - x0))^2 (arXiv 2210.02747).

    Args:
        v: [B, C, H, W] velocity at the noised latents; gradients flow.
        x0: [B, C, H, W] clean latents.
        noise: [B, C, H, W].

    Returns:
        [B, H, W].
    """
    check_same_shape(v=v, x0=x0, noise=noise)
    return ((full_precision(v) - _target(x0, noise)) ** 2).mean(dim=1)


def nft_branches(v: Tensor, v_old: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """DiffusionNFT's implicit positive and negative policies (arXiv 2509.16117).

        v+ = beta v + (1 - beta) v_old,     v- = (1 + beta) v_old - beta v

    Args:
        v: [B, C, H, W] velocity of the policy; gradients flow.
        v_old: [B, C, H, W] velocity of the data-collecting policy; detached.
        beta: mixing strength > 0.

    Returns:
        (v+, v-), both [B, C, H, W].

    Raises:
        ValueError: for a beta that is not positive.
    """
    if beta <= 0:
        raise ValueError(
            f"beta={beta}: at 0 neither branch depends on the policy. Use a positive beta; NFT uses 1 or 0.1."
        )
    check_same_shape(v=v, v_old=v_old)
    v, v_old = full_precision(v), full_precision(v_old.detach())
    return beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v


def nft_label(advantage: Tensor, *, clip: float = 5.0, mode: NFTMode = "all") -> Tensor:
    """DiffusionNFT's soft label, how likely a sample is good: r = clamp(A, +-clip) / (2 clip) + 1/2.

    Args:
        advantage: any shape.
        clip: the advantage at which the label saturates.
        mode: what the advantage is replaced by after clamping: itself; its positive part; its negative part;
            1[A > 0]; sign A.

    Returns:
        The same shape, in [0, 1]; 1/2 means no preference, and its loss has no gradient at v = v_old.

    Raises:
        ValueError: for a clip that is not positive, or an unknown mode.
    """
    if clip <= 0:
        raise ValueError(f"clip={clip}: the label saturates at A = clip. Use a positive value; NFT uses 5.")
    clipped = full_precision(advantage).clamp(-clip, clip)
    if mode == "positive_only":
        clipped = clipped.clamp(min=0)
    elif mode == "negative_only":
        clipped = clipped.clamp(max=0)
    elif mode == "one_only":
        clipped = (clipped > 0).to(clipped.dtype)
    elif mode == "binary":
        clipped = clipped.sign()
    elif mode != "all":
        raise ValueError(
            f"mode={mode!r}: unknown label. Use 'all', 'positive_only', 'negative_only', 'one_only', 'binary'."
        )
    return (clipped / (2 * clip) + 0.5).clamp(0, 1)


def nft_branch_error(v_branch: Tensor, x0: Tensor, noise: Tensor, sigma: Scalar) -> Tensor:
    """Adaptively weighted x0-error of one branch per location (DiffusionNFT, arXiv 2509.16117).

        l_p = mean_C (x0_hat - x0)^2 / w,   x0_hat = x_sigma - sigma v
        w   = max( mean_D |x0_hat - x0|, 1e-5 )  per sample, in float64, without gradient

    Args:
        v_branch: [B, C, H, W] v+ or v-; gradients flow.
        x0: [B, C, H, W].
        noise: [B, C, H, W].
        sigma: float or [B].

    Returns:
        [B, H, W].
    """
    check_same_shape(v_branch=v_branch, x0=x0, noise=noise)
    v_branch = full_precision(v_branch)
    residual = per_sample(sigma, v_branch, name="sigma") * (_target(x0, noise) - v_branch)
    return (residual**2).mean(dim=1) / adaptive_weight(residual)


def nft_loss_map(
    v: Tensor,
    v_old: Tensor,
    x0: Tensor,
    noise: Tensor,
    sigma: Scalar,
    label: Tensor,
    *,
    beta: float = 1.0,
    clip: float = 5.0,
    weight: Scalar = 1.0,
) -> Tensor:
    """DiffusionNFT's loss per location (arXiv 2509.16117).

        L_p = weight_p clip ( r l+_p + (1 - r) l-_p ) / beta

    The published loss is the mean over batch and space with weight 1; it has no KL term here (see
    `squared_error_map`). A label per location that falls back to 1/2 means "no preference" there, which a
    weight of 0 is not the same as: the label keeps anchoring the policy to the old one.

    Args:
        v: [B, C, H, W] velocity of the policy at x_sigma; gradients flow.
        v_old: [B, C, H, W] velocity of the data-collecting policy at x_sigma.
        x0: [B, C, H, W].
        noise: [B, C, H, W].
        sigma: float or [B].
        label: r in [0, 1], [B], or broadcastable to [B, H, W].
        beta: mixing strength.
        clip: the advantage clip behind the label; only scales the loss.
        weight: non-negative; float, [B], or broadcastable to [B, H, W].

    Returns:
        [B, H, W].
    """
    positive, negative = nft_branches(v, v_old, beta=beta)
    error_positive = nft_branch_error(positive, x0, noise, sigma)
    error_negative = nft_branch_error(negative, x0, noise, sigma)
    label = credit_map(label, error_positive, name="label")
    weight = credit_map(weight, error_positive, name="weight")
    return weight * (clip / beta) * (label * error_positive + (1 - label) * error_negative)


def weighted_matching_loss_map(error: Tensor, advantage: Scalar, *, weight: Scalar = 1.0) -> Tensor:
    """Reward-weighted regression and supervised fine-tuning, L_p = weight_p A e_p (Flow-GRPO's baselines).

    A is the raw reward (RWR, linear as published) or 1[best of group] (SFT).

    Args:
        error: [B, H, W] flow-matching error.
        advantage: float, [B], or broadcastable to [B, H, W].
        weight: non-negative; float, [B], or broadcastable to [B, H, W].

    Returns:
        [B, H, W].
    """
    advantage = credit_map(advantage, error, name="advantage")
    return credit_map(weight, error, name="weight") * advantage * error


def adaptive_weight(residual: Tensor, *, floor: float = 1e-5) -> Tensor:
    """Per-sample scale of a residual, w = max(mean_D |residual|, floor), without gradient (arXiv 2509.16117).

    Args:
        residual: [B, C, H, W].
        floor: smallest weight.

    Returns:
        [B, 1, 1], in the dtype of the residual; the mean is taken in float64.
    """
    with torch.no_grad():
        scale = residual.double().abs().mean(dim=(1, 2, 3)).clamp(min=floor)
        return scale.to(residual.dtype)[:, None, None]


def credit_map(value: Scalar, target: Tensor, *, name: str) -> Tensor:
    """Broadcast credit into a [B, H, W] loss map, never the other way round.

    Args:
        value: float, [B], or a tensor broadcastable to `target`.
        target: [B, H, W].
        name: what to call the value in an error.

    Returns:
        A tensor that broadcasts against `target`, in its dtype, detached.
    """
    if not isinstance(value, Tensor) or value.ndim <= 1:
        return per_sample(value, target, name=name).detach()
    check_broadcasts_into(target, **{name: value})
    return value.detach().to(target.dtype)


def _target(x0: Tensor, noise: Tensor) -> Tensor:
    return full_precision(noise) - full_precision(x0)
