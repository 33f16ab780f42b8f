"""Policy-gradient surrogates on log-ratios that may keep their space axes.

A log-ratio is a *mean* over coordinates, so the fewer locations it averages over, the noisier it is:
`scaled_clip_range` carries a published clip range to another granularity.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .numerics import Scalar, check_broadcasts_into, check_same_shape, full_precision, per_sample


class SurrogateLoss(NamedTuple):
    """A clipped surrogate before any reduction.

    Attributes:
        loss: broadcast shape of the inputs, gradients flow.
        ratio: same shape, detached.
        clipped_high: bool, where the clip at 1 + range is active (advantage > 0), so the gradient is 0.
        clipped_low: bool, where the clip at 1 - range is active (advantage < 0).
    """

    loss: Tensor
    ratio: Tensor
    clipped_high: Tensor
    clipped_low: Tensor


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, clip_range: Scalar, *, weight: Scalar = 1.0
) -> SurrogateLoss:
    """PPO's clipped objective as a loss (arXiv 1707.06347, eq. 7; Flow-GRPO, arXiv 2505.05470), per element.

        rho = exp(log_ratio),   loss = weight * max(-A rho, -A clip(rho, 1 - eps, 1 + eps))

    The weight is outside the max, so that credit maps never flip the sign that decides about clipping.

    Args:
        log_ratio: any shape, for example [B, h, w], [B, T] or [B].
        advantage: broadcastable to `log_ratio` (never the other way round); the caller clamps it first if it
            wants to.
        clip_range: eps > 0, float or tensor broadcastable to `log_ratio`.
        weight: non-negative, float or tensor broadcastable to `log_ratio`.

    Returns:
        SurrogateLoss of the shape of `log_ratio`.

    Raises:
        ValueError: for a clip range that is not positive, or factors that would expand the loss.
    """
    if not isinstance(clip_range, Tensor) and clip_range <= 0:
        raise ValueError(f"clip_range={clip_range}: clipping everything stops learning. Use clip_range > 0.")
    log_ratio = full_precision(log_ratio)
    check_broadcasts_into(log_ratio, advantage=advantage, clip_range=clip_range, weight=weight)
    ratio = torch.exp(log_ratio)
    clipped = _clip(ratio, clip_range)
    loss = weight * torch.maximum(-advantage * ratio, -advantage * clipped)
    fixed = ratio.detach()
    return SurrogateLoss(
        loss=loss,
        ratio=fixed,
        clipped_high=(advantage > 0) & (fixed > 1 + clip_range),
        clipped_low=(advantage < 0) & (fixed < 1 - clip_range),
    )


def reinforce(log_prob: Tensor, advantage: Tensor, *, weight: Scalar = 1.0) -> Tensor:
    """The plain policy gradient, loss = -weight A log p (Williams 1992), per element.

    Args:
        log_prob: any shape.
        advantage: broadcastable to `log_prob`.
        weight: non-negative, float or tensor broadcastable to `log_prob`.

    Returns:
        The shape of `log_prob`.
    """
    log_prob = full_precision(log_prob)
    check_broadcasts_into(log_prob, advantage=advantage, weight=weight)
    return -weight * advantage * log_prob


def pool_log_ratio(log_ratio_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average a log-ratio map over the cells of a coarser credit grid.

    A mean log-ratio is the log of a geometric mean of ratios; (1, 1) gives the ratio of a whole sample.

    Args:
        log_ratio_map: [N, H, W].
        grid: (h, w) with h dividing H and w dividing W.

    Returns:
        [N, h, w].

    Raises:
        ValueError: for a grid that does not divide the latents.
    """
    num, height, width = log_ratio_map.shape
    rows, columns = grid
    if rows < 1 or columns < 1 or height % rows or width % columns:
        raise ValueError(
            f"grid={grid} does not divide the latent grid ({height}, {width}) into equal cells. "
            f"Choose a grid whose sides divide {height} and {width}."
        )
    cells = log_ratio_map.reshape(num, rows, height // rows, columns, width // columns)
    return cells.mean(dim=(2, 4))


def detached_log_ratio(log_ratio: Tensor, whole: Tensor) -> Tensor:
    """The value of the whole sample's ratio with the gradient of one place (DenseFlow-GRPO, arXiv 2510.01010).

        s_p = sg(rho) pi_p / sg(pi_p),   so   log s_p = sg(log rho) + log pi_p - sg(log pi_p)

    All places of a sample share one value, hence one clip and the clip range of a ratio per sample; each place keeps
    its own gradient, rho grad log pi_p, so that a signed advantage can differ from place to place. With the same
    advantage everywhere the mean over places is the surrogate of the whole sample, gradient included.

    Args:
        log_ratio: [N, h, w], of each place; gradients flow.
        whole: broadcastable to it, of the whole sample; only its value is used.

    Returns:
        [N, h, w].
    """
    log_ratio = full_precision(log_ratio)
    check_broadcasts_into(log_ratio, whole=whole)
    return whole.detach() + (log_ratio - log_ratio.detach())


def scaled_clip_range(clip_range: float, merged: int, *, summed: int = 1) -> float:
    """Carry a per-sample clip range to a ratio that averages over fewer locations, eps_p = eps sqrt(P) C.

    The noise of a mean log-ratio falls with the square root of the number of locations in it; a ratio per
    location of a grid with P locations is therefore sqrt(P) times as noisy as the ratio of the whole sample. A
    log-ratio that adds its C channels up, where the published one averages them, is C times as large.

    Args:
        clip_range: the published range for one ratio per sample.
        merged: P, how many locations the published ratio merges and this one keeps apart: h * w of the grid.
        summed: C where channels are added up, 1 where they are averaged.

    Returns:
        clip_range * sqrt(merged) * summed.

    Raises:
        ValueError: for fewer than one location.
    """
    if merged < 1:
        raise ValueError(f"merged={merged}: a grid has at least one location. Pass h * w of the credit grid.")
    return clip_range * math.sqrt(merged) * summed


def grpo_guard_log_ratio(
    log_ratio: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: Scalar,
    *,
    bias: Literal["sample", "batch"] = "sample",
) -> Tensor:
    """GRPO-Guard's normalised log-ratio (arXiv 2510.22319), per location.

        log rho~ = ( log rho + b ) c,   c = std = s sqrt(-dt),   b = mean_C (mean - old_mean)^2 / (2 c^2)

    +b removes the negative mean of log rho and c equalises its spread over steps. It is linear, so averaging
    the result over space gives the paper's ratio of a whole sample. The paper then divides the loss by -dt
    (see `inverse_dt_weights`); clip ranges are 2e-6 to 4e-6.

    Args:
        log_ratio: [B, H, W] log-density difference to the old policy.
        mean: [B, C, H, W] of the current policy; gradients flow.
        old_mean: [B, C, H, W] of the old policy; detached.
        std: the full standard deviation; float, [B] or [B, 1, 1, 1], positive.
        bias: "sample" is the paper and verl-omni: every sample its own b; "batch" is flow_grpo's script,
            which averages b over the whole micro-batch (a reduction over an empty tuple of axes reduces all
            of them).

    Returns:
        [B, H, W].

    Raises:
        ValueError: for an unknown bias.
    """
    check_same_shape(mean=mean, old_mean=old_mean)
    log_ratio, mean = full_precision(log_ratio), full_precision(mean)
    scale = per_sample(std, mean, name="std")
    drift = ((mean - old_mean.detach()) ** 2 / (2 * scale**2)).mean(dim=1)
    if bias == "batch":
        drift = drift.mean()
    elif bias != "sample":
        raise ValueError(f"bias={bias!r}: whose drift is removed? Use 'sample' (the paper) or 'batch' (flow_grpo).")
    return (log_ratio + drift) * scale[:, 0]


def flow_dppo_surrogate(
    log_ratio: Tensor, advantage: Tensor, divergence: Tensor, threshold: float, *, weight: Scalar = 1.0
) -> SurrogateLoss:
    """Flow-DPPO's objective: no clip, but a mask by the exact Gaussian KL (arXiv 2606.11025), per element.

        loss = -weight A rho, and 0 where divergence >= threshold and the update moves further away
               (A > 0 and rho > 1, or A < 0 and rho < 1)

    Unlike a clip range, the threshold needs no rescaling with the granularity: the divergence is exact, not a
    noisy estimate.

    Args:
        log_ratio: any shape, for example [B, h, w] or [B].
        advantage: broadcastable to `log_ratio`.
        divergence: KL of the current step from the old one, `kl_map(mean, old_mean, std)` pooled to the same
            grid; broadcastable to `log_ratio`.
        threshold: published 1e-5.
        weight: non-negative, float or tensor broadcastable to `log_ratio`.

    Returns:
        SurrogateLoss; clipped_high and clipped_low are the masked elements with A > 0 and A < 0.
    """
    log_ratio = full_precision(log_ratio)
    check_broadcasts_into(log_ratio, advantage=advantage, divergence=divergence, weight=weight)
    ratio = torch.exp(log_ratio)
    fixed = ratio.detach()
    far = divergence.detach() >= threshold
    high = far & (fixed > 1) & (advantage > 0)
    low = far & (fixed < 1) & (advantage < 0)
    loss = torch.where(high | low, 0, -weight * advantage * ratio)
    return SurrogateLoss(loss=loss, ratio=fixed, clipped_high=high, clipped_low=low)


def _clip(ratio: Tensor, clip_range: Scalar) -> Tensor:
    if isinstance(clip_range, Tensor):
        return ratio.clamp(1 - clip_range, 1 + clip_range)
    return ratio.clamp(1 - clip_range, 1 + clip_range)  # numbers stay on the host: no copy to the device
