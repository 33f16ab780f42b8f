"""Log-densities and divergences of Gaussian steps, kept as maps [B, H, W].

Only the channel axis is averaged here. Published log-probs are the mean over all C * H * W coordinates:
average the map over space to get them. (A mean, never a sum: all published clip ranges and KL coefficients
rely on it.)
"""

from typing import Literal

import torch
from torch import Tensor

from .numerics import Scalar, check_same_shape, full_precision, per_sample
from .transitions import Transition

LOG_SQRT_2PI = 0.9189385175704956
"""log sqrt(2 pi) rounded to float32, which is what every published implementation adds: 1.6e-8 below the true value.
It cancels in every ratio, and keeping it lets float64 log-probs be compared to 1e-10."""

KLForm = Literal["flow_grpo", "exact", "v", "x"]


def log_prob_map(x_next: Tensor, mean: Tensor, std: Scalar) -> Tensor:
    """Log-density of a step per location, averaged over channels.

        l_p = mean_C [ -(x' - mean)^2 / (2 std^2) - log std - log sqrt(2 pi) ]

    Where std is 0 the step is deterministic and has no density: the map is exactly 0 there and so is its
    gradient, which makes the ratio of such a step exactly 1. (Masked by `where`: nan * 0 would still be nan.)

    Args:
        x_next: [B, C, H, W] the state that was drawn; detached, since the action is data (Flow-GRPO, arXiv
            2505.05470).
        mean: [B, C, H, W].
        std: the full standard deviation, float, [B] or [B, 1, 1, 1].

    Returns:
        [B, H, W].
    """
    check_same_shape(x_next=x_next, mean=mean)
    x_next, mean = full_precision(x_next.detach()), full_precision(mean)
    std = per_sample(std, mean, name="std")
    stochastic = std > 0
    safe_std = torch.where(stochastic, std, 1)
    log_prob = -((x_next - mean) ** 2) / (2 * safe_std**2) - torch.log(safe_std) - LOG_SQRT_2PI
    return torch.where(stochastic, log_prob, 0).mean(dim=1)


def cps_log_prob_map(x_next: Tensor, mean: Tensor) -> Tensor:
    """Flow-CPS's log-prob without constants, l_p = -mean_C (x' - mean)^2 (arXiv 2509.05952).

    Dropping 1 / (2 std^2) reweights step t by 2 std_t^2; published clip ranges (1e-5) are tuned to it.
    `log_prob_map` gives the true density.

    Args:
        x_next: [B, C, H, W] the state that was drawn; detached.
        mean: [B, C, H, W].

    Returns:
        [B, H, W].
    """
    return -squared_error_map(x_next.detach(), mean)


def squared_error_map(a: Tensor, b: Tensor) -> Tensor:
    """Channel mean of a squared difference, mean_C (a - b)^2.

    Args:
        a: [B, C, H, W].
        b: [B, C, H, W].

    Returns:
        [B, H, W].
    """
    check_same_shape(a=a, b=b)
    return ((full_precision(a) - full_precision(b)) ** 2).mean(dim=1)


def kl_map(mean: Tensor, other_mean: Tensor, scale: Scalar) -> Tensor:
    """KL divergence of two Gaussians of equal width per coordinate, mean_C (mean - other)^2 / (2 scale^2).

    With the full std this is the exact KL; with s = std / sqrt(-dt) it is Flow-GRPO's, |dt| times as large.
    Where scale is 0 both steps are deterministic and the map is 0.

    Args:
        mean: [B, C, H, W].
        other_mean: [B, C, H, W].
        scale: float, [B] or [B, 1, 1, 1].

    Returns:
        [B, H, W].
    """
    check_same_shape(mean=mean, other_mean=other_mean)
    mean, other_mean = full_precision(mean), full_precision(other_mean)
    scale = per_sample(scale, mean, name="scale")
    positive = scale > 0
    kl = (mean - other_mean) ** 2 / (2 * torch.where(positive, scale, 1) ** 2)
    return torch.where(positive, kl, 0).mean(dim=1)


def reference_kl_map(
    transition: Transition, reference: Transition, v: Tensor, v_reference: Tensor, *, form: KLForm
) -> Tensor:
    """Distance to a reference policy at one step, in one of the four forms that published code uses.

        flow_grpo: mean_C (mean - mean_ref)^2 / (2 s^2)      Flow-GRPO, arXiv 2505.05470 (CPS: s = std)
        exact:     mean_C (mean - mean_ref)^2 / (2 std^2)    the true KL; TempFlow-GRPO, arXiv 2508.04324
        v:         mean_C (v - v_ref)^2                      DiffusionNFT, arXiv 2509.16117; AWM; DGPO; CRD
        x:         mean_C (mean - mean_ref)^2                Flow-Factory

    Their coefficients are not interchangeable: the same beta means a different strength in each form.

    Args:
        transition: step of the current policy.
        reference: step of the reference policy from the same state.
        v: [B, C, H, W] velocity of the current policy.
        v_reference: [B, C, H, W] velocity of the reference policy.
        form: which of the four.

    Returns:
        [B, H, W].

    Raises:
        ValueError: for an unknown form.
    """
    if form == "flow_grpo":
        return kl_map(transition.mean, reference.mean, transition.scale)
    if form == "exact":
        return kl_map(transition.mean, reference.mean, transition.std)
    if form == "v":
        return squared_error_map(v, v_reference)
    if form == "x":
        return squared_error_map(transition.mean, reference.mean)
    raise ValueError(f"form={form!r}: unknown KL form. Use 'flow_grpo', 'exact', 'v' or 'x'.")
