"""Allocation over time: weights per step [T] (mean one), and chunks of steps that share a ratio."""

import torch
from torch import Tensor

from .maps import mean_one
from .numerics import full_precision


def noise_aware_weights(std: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """TempFlow-GRPO's weighting (arXiv 2508.04324): w_t = std_t / mean std, with the full std s sqrt(-dt).

    Undoes part of Flow-SDE's imbalance, whose gradient is 26 times smaller at the first step than at the last
    but one.

    Args:
        std: [T] full std of each step.
        mask: [T] bool, the trained steps; the mean is taken over them.

    Returns:
        [T], mean one over the trained steps and 0 at the others.
    """
    return _mean_one_over(full_precision(std), mask)


def rectified_weights(slope: Tensor, std: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Flash-GRPO's temporal gradient rectification (arXiv 2605.15980): w_t ~ std_t / |d mean_t / d v|, mean one.

    The gradient of a step's log-density with respect to the velocity is noise times |d mean / d v| / std; the weight
    takes that factor out, so that every step pulls on the velocity with the same force. For Flow-SDE the factor is
    sqrt(-dt) (1 / s + s (1 - sigma) / (2 sigma)).

    Args:
        slope: [T], |d mean_t / d v|.
        std: [T], full std of each step.
        mask: [T] bool, the trained steps; the mean is taken over them.

    Returns:
        [T], mean one over the trained steps and 0 at the others.
    """
    slope = full_precision(slope)
    return _mean_one_over(torch.where(slope > 0, std / torch.where(slope > 0, slope, 1), 0), mask)


def inverse_dt_weights(sigmas: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """GRPO-Guard's reweighting (arXiv 2510.22319): w_t ~ 1 / (sigma_t - sigma_{t+1}), mean one.

    Args:
        sigmas: [T + 1], decreasing.
        mask: [T] bool, the trained steps.

    Returns:
        [T], mean one over the trained steps and 0 at the others.
    """
    return _mean_one_over(1 / _step_sizes(sigmas), mask)


def proportional_dt_weights(sigmas: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """PCPO's proportionate credit (arXiv 2509.25774): w_t ~ sigma_t - sigma_{t+1}; else as `inverse_dt_weights`."""
    return _mean_one_over(_step_sizes(sigmas), mask)


def relative_l1(latents: Tensor) -> Tensor:
    """How much each step moves the latents, L_t = |x_t - x_{t+1}|_1 / |x_t|_1 (GCPO, arXiv 2510.21583).

    Args:
        latents: [B, T + 1, C, H, W] from noise to image.

    Returns:
        [B, T].
    """
    flat = full_precision(latents).flatten(2)
    return flat.diff(dim=1).abs().sum(dim=2) / flat[:, :-1].abs().sum(dim=2)


def chunk_by_relative_l1(change: Tensor, num_chunks: int) -> tuple[int, ...]:
    """Cut a rollout into chunks of steps with similar relative change (GCPO, arXiv 2510.21583).

    The public code takes hand-chosen lengths; this reconstruction chooses, of all cuts into consecutive chunks, the
    one with the least squared deviation from the chunks' means.

    Args:
        change: [T] or [B, T] curve from `relative_l1`; averaged over the batch.
        num_chunks: J, between 1 and T.

    Returns:
        J chunk lengths that sum to T.

    Raises:
        ValueError: for more chunks than steps, or none.
    """
    curve = full_precision(change).reshape(-1, change.shape[-1]).mean(dim=0).tolist()
    steps = len(curve)
    if not 1 <= num_chunks <= steps:
        raise ValueError(f"num_chunks={num_chunks} for {steps} steps: every chunk needs at least one step.")
    best: list[tuple[float, tuple[int, ...]]] = [(_spread(curve[:end]), (end,)) for end in range(1, steps + 1)]
    for done in range(1, num_chunks):
        best = [
            min(
                (
                    (best[cut - 1][0] + _spread(curve[cut:end]), (*best[cut - 1][1], end - cut))
                    for cut in range(done, end)
                ),
                default=(float("inf"), ()),
            )
            for end in range(1, steps + 1)
        ]
    return best[-1][1]


def _spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)


def _step_sizes(sigmas: Tensor) -> Tensor:
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas of shape {tuple(sigmas.shape)}: pass the whole decreasing schedule, [T + 1].")
    return -full_precision(sigmas).diff()


def _mean_one_over(weight: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return mean_one(weight, -1)
    if not bool(mask.any()):
        raise ValueError("mask selects no step: there is nothing to weigh. Train at least one step.")
    return torch.zeros_like(weight).masked_scatter(mask, mean_one(weight[mask], -1))
