"""Deterministic solvers of the probability-flow ODE beyond Euler."""

import torch
from torch import Tensor

from .numerics import Scalar, check_same_shape, full_precision, per_sample


def dpm_solver_2m(
    x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar, *, previous_clean: Tensor, sigma_previous: Scalar
) -> Tensor:
    """Second-order multistep DPM-Solver++ in flow coordinates (arXiv 2211.01095): DiffusionNFT's "dpm2".

        x' = (s'/s) x - (1 - s')(e^{-h} - 1)(D0 + D1 / 2)
        D0 = x0_hat,   D1 = (D0 - D0_previous) h / h_previous

    where h = lambda' - lambda and lambda = log((1 - s) / s). Where s' = 0 (h infinite) or sigma_previous = 1
    (h_previous infinite) the step is first order; so are the first two steps and the last one of a full
    rollout.

    Args:
        x: [B, C, H, W].
        v: [B, C, H, W].
        sigma: float or [B], above 0.
        sigma_next: float or [B], smaller than `sigma`.
        previous_clean: [B, C, H, W], `clean_prediction` of the step before (anything finite at the first
            step).
        sigma_previous: float or [B], sigma of the step before, larger than `sigma`; pass 1 at the first step.

    Returns:
        [B, C, H, W].
    """
    check_same_shape(x=x, v=v, previous_clean=previous_clean)
    x, v, previous_clean = full_precision(x), full_precision(v), full_precision(previous_clean)
    sigma, sigma_next = per_sample(sigma, x, name="sigma"), per_sample(sigma_next, x, name="sigma_next")
    sigma_previous = per_sample(sigma_previous, x, name="sigma_previous")
    second_order = (sigma_next > 0) & (sigma_previous < 1) & (sigma < sigma_previous)
    # Where the step is first order any finite log-SNR will do: the result is not used.
    now, then, before = (
        _log_snr(torch.where(second_order, value, anchor))
        for value, anchor in ((sigma, 0.5), (sigma_next, 0.25), (sigma_previous, 0.75))
    )
    clean = x - sigma * v
    extrapolation = 0.5 * (then - now) / (now - before) * (clean - previous_clean)
    return _exponential_step(x, clean + torch.where(second_order, extrapolation, 0), sigma, sigma_next)


def _exponential_step(x: Tensor, clean: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    kept = sigma_next / sigma
    return kept * x + (1 - kept) * clean


def _log_snr(sigma: Tensor) -> Tensor:
    return torch.log1p(-sigma) - torch.log(sigma)
