"""Transition kernels p(x' | x) of the reverse process: x' = mean + std * z with z ~ N(0, I).

Conventions: x_sigma = (1 - sigma) x0 + sigma eps, v = eps - x0, sigma goes from 1 to 0, and
dt = sigma_next - sigma < 0. Every function takes latents [B, C, H, W] and sigmas that are floats or [B] tensors;
gradients flow into `v`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import Scalar, check_same_shape, full_precision, per_sample


class Transition(NamedTuple):
    """One Gaussian step of the reverse process.

    Attributes:
        mean: [B, C, H, W].
        std: [B, 1, 1, 1], the standard deviation of x' given x, including sqrt(-dt).
        scale: [B, 1, 1, 1], the number that published code calls `std_dev_t` and divides its KL by: s without
            sqrt(-dt) for Flow-SDE and Dance-SDE, and the same as `std` for kernels that have no such factor.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor


def clean_prediction(x: Tensor, v: Tensor, sigma: Scalar) -> Tensor:
    """One-step estimate of the clean latent, x0_hat = x - sigma v (Tweedie for a flow).

    Args:
        x: [B, C, H, W] state at `sigma`.
        v: [B, C, H, W] velocity.
        sigma: float or [B].

    Returns:
        [B, C, H, W].
    """
    x, v, sigma = _prepare(x, v, sigma)
    return x - sigma * v


def noise_prediction(x: Tensor, v: Tensor, sigma: Scalar) -> Tensor:
    """One-step estimate of the noise, eps_hat = x + (1 - sigma) v; arguments and shape as of `clean_prediction`."""
    x, v, sigma = _prepare(x, v, sigma)
    return x + (1 - sigma) * v


def euler(x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar) -> Transition:
    """Deterministic Euler step of the probability-flow ODE, x' = x + v dt.

    Args:
        x: [B, C, H, W].
        v: [B, C, H, W].
        sigma: float or [B].
        sigma_next: float or [B], smaller than `sigma`.

    Returns:
        Transition with std and scale 0.
    """
    x, v, sigma, sigma_next = _prepare(x, v, sigma, sigma_next)
    zero = torch.zeros_like(sigma)
    return Transition(x + v * (sigma_next - sigma), zero, zero)


def flow_sde(
    x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar, *, sigma_max: Scalar, noise_level: Scalar
) -> Transition:
    """Flow-GRPO's SDE (arXiv 2505.05470).

        s    = a sqrt(sigma / (1 - sigma~)),   sigma~ = sigma_max where sigma == 1, else sigma
        mean = x (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt
        std  = s sqrt(-dt)

    Since s^2 / (2 sigma) = a^2 / (2 (1 - sigma~)), nothing divides by sigma. `sigma_max` stands in the
    denominator of s only.

    Args:
        x: [B, C, H, W].
        v: [B, C, H, W].
        sigma: float or [B].
        sigma_next: float or [B], smaller than `sigma`.
        sigma_max: sigma_1, the second value of the schedule, used where sigma is exactly 1; float or [B],
            below 1.
        noise_level: a >= 0; float or [B] (0 gives the Euler step for that sample).

    Returns:
        Transition with scale = s.
    """
    _check_noise_level(noise_level, upper=None)
    x, v, sigma, sigma_next = _prepare(x, v, sigma, sigma_next)
    sigma_max = per_sample(sigma_max, x, name="sigma_max")
    level = per_sample(noise_level, x, name="noise_level")
    dt = sigma_next - sigma
    headroom = 1 - torch.where(sigma == 1, sigma_max, sigma)
    scale = level * torch.sqrt(sigma / headroom)
    half_rate = level**2 / (2 * headroom)
    mean = x * (1 + half_rate * dt) + v * (1 + half_rate * (1 - sigma)) * dt
    return Transition(mean, scale * torch.sqrt(-dt), scale)


def dance_sde(x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar, *, eta: Scalar) -> Transition:
    """DanceGRPO's SDE with a constant diffusion (arXiv 2505.07818).

        std   = eta sqrt(-dt)
        mean  = x + v dt - (eta^2 / 2) score dt
        score = -(x - (1 - sigma) x0_hat) / sigma^2

    x - (1 - sigma) x0_hat = sigma eps_hat, so the score is -eps_hat / sigma. With the SD3 schedule the last
    step explodes (sigma = 0.009): keep it deterministic there.

    Args:
        x: [B, C, H, W].
        v: [B, C, H, W].
        sigma: float or [B], above 0.
        sigma_next: float or [B], smaller than `sigma`.
        eta: eta >= 0; float or [B].

    Returns:
        Transition with scale = eta.
    """
    _check_noise_level(eta, upper=None, name="eta")
    x, v, sigma, sigma_next = _prepare(x, v, sigma, sigma_next)
    scale = per_sample(eta, x, name="eta")
    dt = sigma_next - sigma
    score = -noise_prediction(x, v, sigma) / sigma
    mean = x + v * dt - 0.5 * scale**2 * score * dt
    return Transition(mean, scale * torch.sqrt(-dt), scale)


def cps(x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar, *, noise_level: Scalar) -> Transition:
    """Coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952): x' has exactly the noise its sigma says.

        std = sigma' sin(a pi / 2),   mean = (1 - sigma') x0_hat + sqrt(sigma'^2 - std^2) eps_hat

    where sqrt(sigma'^2 - std^2) = sigma' cos(a pi / 2). a = 0 is the Euler step, a = 1 draws all noise anew.

    Args:
        x: [B, C, H, W].
        v: [B, C, H, W].
        sigma: float or [B].
        sigma_next: float or [B], smaller than `sigma`; at 0 the step is deterministic.
        noise_level: a in [0, 1]; float or [B].

    Returns:
        Transition with scale = std.
    """
    _check_noise_level(noise_level, upper=1.0)
    x, v, sigma, sigma_next = _prepare(x, v, sigma, sigma_next)
    angle = per_sample(noise_level, x, name="noise_level") * (math.pi / 2)
    std = sigma_next * torch.sin(angle)
    mean = (1 - sigma_next) * (x - sigma * v) + sigma_next * torch.cos(angle) * noise_prediction(x, v, sigma)
    return Transition(mean, std, std)


def flow_ddim(x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar, *, eta: Scalar) -> Transition:
    """DDIM (arXiv 2010.02502, eq. 12 and 16) in flow coordinates, as DiffusionNFT's solver uses it.

        std  = eta sigma' sqrt(1 - sigma'^2 (1 - sigma)^2 / (sigma^2 (1 - sigma')^2))
        mean = (1 - sigma') x0_hat + sqrt(sigma'^2 - std^2) eps_hat

    eta = 0 is exactly the Euler step: x0_hat and eps_hat are held over the step in both.

    Args:
        x: [B, C, H, W].
        v: [B, C, H, W].
        sigma: float or [B], above 0.
        sigma_next: float or [B], smaller than `sigma`.
        eta: eta in [0, 1]; float or [B].

    Returns:
        Transition with scale = std.
    """
    _check_noise_level(eta, upper=1.0, name="eta")
    x, v, sigma, sigma_next = _prepare(x, v, sigma, sigma_next)
    level = per_sample(eta, x, name="eta")
    kept = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
    std = level * sigma_next * torch.sqrt(1 - kept**2)
    direction = torch.sqrt(sigma_next**2 - std**2)
    mean = (1 - sigma_next) * (x - sigma * v) + direction * noise_prediction(x, v, sigma)
    return Transition(mean, std, std)


def precise(x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar, *, noise_level: Scalar) -> Transition:
    """Precise's step (arXiv 2605.23522): the SDE integrated exactly while x0_hat is held over the step.

        q    = sigma' (1 - sigma) / (sigma (1 - sigma'))
        std  = sigma' sqrt(1 - q^(a^2))
        mean = (1 - sigma') x0_hat + sqrt(sigma'^2 - std^2) eps_hat

    q is what is left of the noise-to-signal ratio, so noise is spent evenly in log SNR. x' has exactly the noise that
    its sigma says, and the spread of the data is kept as steps get short. From sigma = 1 all noise is drawn anew.
    a^2 = 2 is `flow_ddim` with eta = 1.

    Args:
        x: [B, C, H, W].
        v: [B, C, H, W].
        sigma: float or [B], above 0.
        sigma_next: float or [B], smaller than `sigma`; at 0 the step is deterministic.
        noise_level: a >= 0; float or [B] (0 gives the Euler step).

    Returns:
        Transition with scale = std.
    """
    _check_noise_level(noise_level, upper=None)
    x, v, sigma, sigma_next = _prepare(x, v, sigma, sigma_next)
    level = per_sample(noise_level, x, name="noise_level")
    left = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
    std = sigma_next * torch.sqrt(1 - left ** (level**2))
    direction = torch.sqrt(sigma_next**2 - std**2)
    mean = (1 - sigma_next) * (x - sigma * v) + direction * (x + (1 - sigma) * v)
    return Transition(mean, std, std)


def _prepare(x: Tensor, v: Tensor, *sigmas: Scalar) -> tuple[Tensor, ...]:
    check_same_shape(x=x, v=v)
    x, v = full_precision(x), full_precision(v)
    return x, v, *(per_sample(sigma, x, name="sigma") for sigma in sigmas)


def _check_noise_level(value: Scalar, *, upper: float | None, name: str = "noise_level") -> None:
    if isinstance(value, Tensor):  # looking into a tensor would stall the device
        return
    if value < 0 or (upper is not None and value > upper):
        bound = ">= 0" if upper is None else f"in [0, {upper:g}]"
        raise ValueError(f"{name}={value}: this kernel needs {name} {bound}; 0 gives the deterministic step.")
