"""Advantage weighted matching (AWM, arXiv 2509.25050): flow-matching errors as log-likelihoods in a surrogate.

The ratio is exp(l - l_old); on policy l_old = l.detach() and the gradient is that of an advantage-weighted
matching loss.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from .matching import credit_map
from .numerics import Scalar, full_precision, per_sample

AWMWeighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
AWMKLWeighting = Literal["uniform", "elbo"]


def awm_log_likelihood(error: Tensor, t: Scalar, *, weighting: AWMWeighting = "ghuber", power: float = 0.25) -> Tensor:
    """Log-likelihood of a flow-matching error m at time t (AWM, arXiv 2509.25050), element by element.

        uniform  -m
        t        -t m
        t2       -t^2 m
        huber    -t ( sqrt(m + 1e-10) - 1e-5 )
        ghuber   -t ( (m + 1e-10)^p - (1e-10)^p ) / p

    The Huber forms are not linear in m: on a map they bound each location's influence, on a sample's mean
    (what AWM publishes) the sample's.

    Args:
        error: [B] mean error per sample, or [B, H, W] error map; gradients flow.
        t: sigma at which the error was taken; float or [B].
        weighting: which form.
        power: p of "ghuber".

    Returns:
        The shape of `error`.

    Raises:
        ValueError: for an unknown weighting, or a power that is not positive.
    """
    error = full_precision(error)
    t = per_sample(t, error, name="t")
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -t * error
    if weighting == "t2":
        return -(t**2) * error
    if weighting == "huber":
        return -t * (torch.sqrt(error + 1e-10) - 1e-5)
    if weighting == "ghuber":
        if power <= 0:
            raise ValueError(f"power={power}: ghuber needs a positive power; AWM uses 0.25.")
        return -t * (torch.pow(error + 1e-10, power) - math.pow(1e-10, power)) / power
    raise ValueError(f"weighting={weighting!r}: unknown. Use 'uniform', 't', 't2', 'huber' or 'ghuber'.")


def awm_advantage(advantage: Tensor, *, clip: float = 5.0, scale: float = 1.0) -> Tensor:
    """AWM's scaled advantage, A' = clamp(A, +-clip) / clip * scale.

    Args:
        advantage: any shape.
        clip: largest absolute advantage.
        scale: what it is mapped to.

    Returns:
        The same shape, in [-scale, scale].

    Raises:
        ValueError: for a clip that is not positive.
    """
    if clip <= 0:
        raise ValueError(f"clip={clip}: the largest advantage is positive; AWM uses 5.")
    return full_precision(advantage).clamp(-clip, clip) / clip * scale


def awm_noise_scale(t: Tensor, *, level: float = 0.7) -> Tensor:
    """Scale of AWM's ELBO weighting, s = level sqrt(t / (1 - clamp(t, 0, .99))): Flow-SDE's s, but bounded.

    Args:
        t: any shape, in [0, 1].
        level: a.

    Returns:
        The same shape.
    """
    t = full_precision(t)
    return level * torch.sqrt(t / (1 - t.clamp(0, 0.99)))


def awm_kl_map(
    v: Tensor, v_other: Tensor, t: Scalar, *, weighting: AWMKLWeighting = "uniform", weight: Scalar = 1.0
) -> Tensor:
    """AWM's distance to a reference or averaged policy: mean_C (v - v')^2, divided by 2 s^2 for "elbo".

    Args:
        v: [B, C, H, W] velocity of the policy; gradients flow.
        v_other: [B, C, H, W]; detached.
        t: sigma; float or [B].
        weighting: "uniform" or "elbo" (s from `awm_noise_scale`).
        weight: non-negative; float, [B], or broadcastable to [B, H, W].

    Returns:
        [B, H, W].

    Raises:
        ValueError: for an unknown weighting.
    """
    error = ((full_precision(v) - full_precision(v_other.detach())) ** 2).mean(dim=1)
    error = credit_map(weight, error, name="weight") * error
    if weighting == "uniform":
        return error
    if weighting == "elbo":
        return error / (2 * awm_noise_scale(per_sample(t, error, name="t")) ** 2)
    raise ValueError(f"weighting={weighting!r}: unknown. Use 'uniform' or 'elbo'.")
