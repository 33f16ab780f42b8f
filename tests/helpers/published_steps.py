"""Formulas of published code that no part uses, against which ours and the golden cases are compared: schedules,
solvers, diffusers' DDIM in its own coordinates, the order of prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlt2i.functional.epsilon import vp_sigma
from rlt2i.functional.numerics import Scalar, check_same_shape, full_precision, per_sample
from rlt2i.functional.schedules import _check_num_steps, shift_sigma
from rlt2i.functional.solvers import _exponential_step
from rlt2i.functional.transitions import Transition


def k_repeat_indices(
    dataset_size: int, *, batch_size: int, repeats: int, num_ranks: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Flow-GRPO's distributed sampler for one batch, as a function of its seed.

    m = num_ranks * batch_size / repeats distinct prompts are drawn, each repeated `repeats` times, shuffled,
    and cut into one slice per rank. Flow-GRPO's seed is its seed plus the epoch counter.

    Args:
        dataset_size: number of prompts.
        batch_size: samples per rank.
        repeats: k, rollouts per prompt.
        num_ranks: number of ranks.
        seed: of this batch; all ranks must pass the same.

    Returns:
        For each rank, `batch_size` prompt indices.
    """
    total = num_ranks * batch_size
    if repeats < 1 or total % repeats:
        raise ValueError(
            f"{num_ranks} ranks with {batch_size} samples cannot hold whole groups of {repeats}. "
            "Choose a batch size so that num_ranks * batch_size is a multiple of the group size."
        )
    distinct = total // repeats
    if distinct > dataset_size:
        raise ValueError(f"{distinct} distinct prompts per batch, but the data set has only {dataset_size}.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(dataset_size, generator=generator)[:distinct].repeat_interleave(repeats)
    shuffled = chosen[torch.randperm(total, generator=generator)]
    return tuple(tuple(row.tolist()) for row in shuffled.view(num_ranks, batch_size))


def ema_update(average: Tensor, parameter: Tensor, decay: float) -> Tensor:
    """One step of an exponential moving average, e + (1 - d)(p - e).

    Args:
        average: any shape.
        parameter: the same shape.
        decay: d in [0, 1]; 0 copies the parameter, 1 keeps the average.

    Returns:
        The same shape, detached; never an alias of the parameter.
    """
    return torch.lerp(average.detach(), parameter.detach().to(average.dtype), 1 - decay)


def vp_to_flow(x_vp: Tensor, alpha_bar: Scalar) -> tuple[Tensor, Tensor]:
    """Change a variance-preserving state into a flow state, x = x_vp / (alpha + s).

    Args:
        x_vp: [B, C, H, W].
        alpha_bar: float or [B].

    Returns:
        (x [B, C, H, W], sigma [B, 1, 1, 1]).
    """
    x_vp = full_precision(x_vp)
    alpha_bar = per_sample(alpha_bar, x_vp, name="alpha_bar")
    return x_vp / (torch.sqrt(alpha_bar) + torch.sqrt(1 - alpha_bar)), vp_sigma(alpha_bar)


def ddim(x_vp: Tensor, epsilon: Tensor, alpha_bar: Scalar, alpha_bar_next: Scalar, *, eta: Scalar) -> Transition:
    """DDIM step of an epsilon-prediction model (arXiv 2010.02502, eq. 12 and 16), DDPO's policy (2305.13301).

        x0_hat = (x - sqrt(1 - ab) eps) / sqrt(ab),   std = eta sqrt( (1 - ab') / (1 - ab) (1 - ab / ab') )
        mean   = sqrt(ab') x0_hat + sqrt(1 - ab' - std^2) eps

    Its log-prob is `log_prob_map`, in variance-preserving coordinates.

    Args:
        x_vp: [B, C, H, W].
        epsilon: [B, C, H, W] noise prediction; gradients flow.
        alpha_bar: ab, float or [B].
        alpha_bar_next: ab', float or [B], larger than `alpha_bar`.
        eta: float or [B]; 1 in DDPO, 0 is deterministic.

    Returns:
        Transition in variance-preserving coordinates, with scale = std.
    """
    check_same_shape(x_vp=x_vp, epsilon=epsilon)
    x_vp, epsilon = full_precision(x_vp), full_precision(epsilon)
    now = per_sample(alpha_bar, x_vp, name="alpha_bar")
    then = per_sample(alpha_bar_next, x_vp, name="alpha_bar_next")
    variance = (1 - then) / (1 - now) * (1 - now / then)
    std = per_sample(eta, x_vp, name="eta") * torch.sqrt(variance)
    clean = (x_vp - torch.sqrt(1 - now) * epsilon) / torch.sqrt(now)
    mean = torch.sqrt(then) * clean + torch.sqrt(1 - then - std**2) * epsilon
    return Transition(mean, std, std)


def ddim_previous_timestep(timestep: Tensor, *, num_steps: int, num_train_timesteps: int = 1000) -> Tensor:
    """DDPO's next timestep, t' = max(t - M // N, 0): the last step ends at alpha_bar_0, not at a clean image.

    Args:
        timestep: [B] long.
        num_steps: N.
        num_train_timesteps: M.

    Returns:
        [B] long.
    """
    return (timestep - num_train_timesteps // num_steps).clamp(min=0)


def transition_to_flow(transition: Transition, alpha_bar_next: Scalar) -> Transition:
    """Express a step in variance-preserving coordinates as a step of the flow: divide by k' = alpha' + s'.

    Args:
        transition: from `ddim`.
        alpha_bar_next: float or [B], of the state that the step leads to.

    Returns:
        Transition in flow coordinates.
    """
    then = per_sample(alpha_bar_next, transition.mean, name="alpha_bar_next")
    scale = torch.sqrt(then) + torch.sqrt(1 - then)
    return Transition(transition.mean / scale, transition.std / scale, transition.scale / scale)


def shifted_linspace_sigmas(num_steps: int, *, shift: float) -> Tensor:
    """DanceGRPO's and MixGRPO's schedule, shift(linspace(1, 0, N + 1)) (arXiv 2505.07818, 2507.21802).

    Args:
        num_steps: N >= 1.
        shift: as in `shift_sigma`.

    Returns:
        [N + 1] float32, from 1 to 0.
    """
    _check_num_steps(num_steps)
    return shift_sigma(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64), shift).float()


def constructed_sigmas(*, shift: float = 3.0, num_train_timesteps: int = 1000) -> Tensor:
    """The training sigmas of a diffusers flow scheduler as constructed: shifted once, no 0 at the end.

        sigma_i = shift( (M - i) / M ),   i = 0 .. M - 1,   M = num_train_timesteps

    Flow-GRPO's SFT and DPO draw an index into them (see `logit_normal_indices`).

    Args:
        shift: as in `shift_sigma`.
        num_train_timesteps: M >= 1.

    Returns:
        [M] float32, decreasing from 1.
    """
    _check_num_steps(num_train_timesteps, name="num_train_timesteps")
    base = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64) / num_train_timesteps
    return shift_sigma(base, shift).float()


def dpm_solver_1(x: Tensor, v: Tensor, sigma: Scalar, sigma_next: Scalar) -> Tensor:
    """First-order DPM-Solver++ in flow coordinates (arXiv 2211.01095).

        x' = (s'/s) x - (1 - s')(e^{-h} - 1) x0_hat

    With lambda = log((1 - s) / s) and h = lambda' - lambda the second coefficient is 1 - s'/s, which needs no
    logarithm and is finite at both ends. The step equals Euler's and DDIM's (eta = 0) exactly; it differs in
    rounding only.

    Args:
        x: [B, C, H, W].
        v: [B, C, H, W].
        sigma: float or [B], above 0.
        sigma_next: float or [B], smaller than `sigma`.

    Returns:
        [B, C, H, W].
    """
    check_same_shape(x=x, v=v)
    x, v = full_precision(x), full_precision(v)
    sigma, sigma_next = per_sample(sigma, x, name="sigma"), per_sample(sigma_next, x, name="sigma_next")
    return _exponential_step(x, x - sigma * v, sigma, sigma_next)
