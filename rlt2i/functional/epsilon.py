"""Epsilon- and v-prediction models as flow policies, by an exact change of variables; DDIM in their own coordinates.

A variance-preserving state x_vp = alpha x0 + s eps with alpha^2 = alpha_bar and s^2 = 1 - alpha_bar is a flow
state times a number:

    k = alpha + s,   x = x_vp / k,   sigma = s / k,   1 - sigma = alpha / k
    =>   x = (1 - sigma) x0 + sigma eps

The density of a step changes by the constant k^D, which cancels in every ratio.
"""

from typing import Literal

import torch
from torch import Tensor

from .numerics import Scalar, check_same_shape, full_precision, per_sample

Spacing = Literal["leading", "trailing"]


def scaled_linear_alpha_bars(
    *, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Tensor:
    """Cumulative products alpha_bar_t of Stable Diffusion's "scaled linear" betas, as in diffusers.

        beta = linspace(sqrt(beta_start), sqrt(beta_end), M)^2,   alpha_bar = cumprod(1 - beta)

    Args:
        num_train_timesteps: M.
        beta_start: first beta.
        beta_end: last beta.

    Returns:
        [M] float32, decreasing.
    """
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32)
    return torch.cumprod(1 - roots**2, dim=0)


def vp_sigma(alpha_bar: Tensor) -> Tensor:
    """Flow time of a variance-preserving noise level, sigma = s / (alpha + s).

    Args:
        alpha_bar: any shape, in [0, 1].

    Returns:
        The same shape: 0 at alpha_bar 1, 1 at alpha_bar 0.
    """
    alpha_bar = full_precision(alpha_bar)
    alpha, s = torch.sqrt(alpha_bar), torch.sqrt(1 - alpha_bar)
    return s / (alpha + s)


def vp_alpha_bar(sigma: Tensor) -> Tensor:
    """Inverse of `vp_sigma`, alpha_bar = (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2).

    Args:
        sigma: any shape, in [0, 1].

    Returns:
        The same shape.
    """
    sigma = full_precision(sigma)
    return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)


def vp_sigmas(alpha_bars: Tensor, timesteps: Tensor, *, final_alpha_bar: float = 1.0) -> Tensor:
    """Flow schedule of an epsilon-prediction model at its own timesteps.

    Args:
        alpha_bars: [M] cumulative products of the model.
        timesteps: [T] long, decreasing.
        final_alpha_bar: where the last step ends; 1 is the clean image, alpha_bars[0] is what DDPO and Stable
            Diffusion do.

    Returns:
        [T + 1] in the dtype of `alpha_bars`, decreasing, from slightly below 1.
    """
    levels = full_precision(alpha_bars)[timesteps]
    return torch.cat([vp_sigma(levels), vp_sigma(levels.new_tensor([final_alpha_bar]))])


def flow_to_vp(x: Tensor, sigma: Scalar) -> tuple[Tensor, Tensor]:
    """Change a flow state into a variance-preserving one, x_vp = x / sqrt((1 - sigma)^2 + sigma^2).

    Args:
        x: [B, C, H, W].
        sigma: float or [B].

    Returns:
        (x_vp [B, C, H, W], alpha_bar [B, 1, 1, 1]).
    """
    x = full_precision(x)
    sigma = per_sample(sigma, x, name="sigma")
    return x * _flow_scale(sigma), vp_alpha_bar(sigma)


def epsilon_to_velocity(x: Tensor, epsilon: Tensor, sigma: Scalar) -> Tensor:
    """Velocity of a flow from a noise prediction.

        x0_hat = (x - sigma eps) / (1 - sigma),   v = eps - x0_hat = (eps - x) / (1 - sigma)

    Ill-conditioned at sigma -> 1: start at the model's own last timestep, whose sigma is slightly below 1, as
    DDIM does.

    Args:
        x: [B, C, H, W] flow state.
        epsilon: [B, C, H, W] the network's noise prediction at k x; gradients flow.
        sigma: float or [B], below 1.

    Returns:
        [B, C, H, W].
    """
    check_same_shape(x=x, epsilon=epsilon)
    x, epsilon = full_precision(x), full_precision(epsilon)
    return (epsilon - x) / (1 - per_sample(sigma, x, name="sigma"))


def v_prediction_to_velocity(x: Tensor, prediction: Tensor, sigma: Scalar) -> Tensor:
    """Velocity of a flow from a "v-prediction" u = alpha eps - s x0 (arXiv 2202.00512; Stable Diffusion 2).

        x0_hat = alpha x_vp - s u,   eps_hat = s x_vp + alpha u
        v = eps_hat - x0_hat = (s - alpha) x_vp + (s + alpha) u

    Args:
        x: [B, C, H, W] flow state.
        prediction: [B, C, H, W] the network's u at k x; gradients flow.
        sigma: float or [B].

    Returns:
        [B, C, H, W].
    """
    check_same_shape(x=x, prediction=prediction)
    x, prediction = full_precision(x), full_precision(prediction)
    sigma = per_sample(sigma, x, name="sigma")
    scale = _flow_scale(sigma)
    return scale**2 * (2 * sigma - 1) * x + scale * prediction


def ddim_timesteps(
    num_steps: int, *, num_train_timesteps: int = 1000, spacing: Spacing = "leading", steps_offset: int = 0
) -> Tensor:
    """The timesteps that DDIM visits, as in diffusers (arXiv 2305.08891, table 2, names the spacings).

        leading:   t_i = i (M // N) + offset,   i = N - 1 .. 0         (Stable Diffusion 1.x and 2.x, offset 1)
        trailing:  t_i = round(M - i M / N) - 1, i = 0 .. N - 1

    Args:
        num_steps: N.
        num_train_timesteps: M.
        spacing: "leading" never visits the noisiest timesteps; "trailing" begins at the last one.
        steps_offset: of "leading".

    Returns:
        [N] long, decreasing, in [0, M).

    Raises:
        ValueError: when there are more steps than timesteps, or the offset leads beyond them.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(
            f"num_steps={num_steps}: the model knows {num_train_timesteps} noise levels. Use 1 <= num_steps <= "
            f"{num_train_timesteps}."
        )
    if spacing == "trailing":
        steps = torch.arange(num_steps, dtype=torch.float64)
        return (num_train_timesteps - steps * num_train_timesteps / num_steps).round().long() - 1
    steps = torch.arange(num_steps - 1, -1, -1) * (num_train_timesteps // num_steps) + steps_offset
    if int(steps[0]) >= num_train_timesteps:
        raise ValueError(
            f"num_steps={num_steps}, steps_offset={steps_offset}: the first timestep would be {int(steps[0])}, but "
            f"the model has {num_train_timesteps}. Use fewer steps."
        )
    return steps


def nearest_timestep(sigma: Tensor, alpha_bars: Tensor) -> Tensor:
    """The timestep of a model whose noise level is nearest to a flow time; exact for levels of the model's own.

    Args:
        sigma: [B].
        alpha_bars: [M] cumulative products, decreasing.

    Returns:
        [B] long. Beyond the model's noisiest level it is the last timestep.
    """
    levels = vp_sigma(alpha_bars)
    return (full_precision(sigma)[:, None] - levels).abs().argmin(dim=1)


def _flow_scale(sigma: Tensor) -> Tensor:
    """k = alpha + s in terms of sigma; between 1 and sqrt 2."""
    return 1 / torch.sqrt((1 - sigma) ** 2 + sigma**2)
