"""The one denoising loop that every sampler shares."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from rlt2i.functional.transitions import clean_prediction, euler
from rlt2i.interfaces import Policy, RolloutRequest
from rlt2i.types import Conditioning, Trajectory, TransitionKernel

CLEAN_PREDICTIONS = "clean_predictions"
"""Capture [B, T, C, H, W]: the one-step estimate of x_0 before each step (Tweedie)."""


class Solver(Protocol):
    """A deterministic step; `previous_clean` is the clean prediction of the step before, at `sigma_previous`.

    At the first step there is none: then `sigma_previous` is 1.
    """

    def __call__(
        self,
        x: Tensor,
        v: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        *,
        previous_clean: Tensor,
        sigma_previous: Tensor,
    ) -> Tensor: ...


def euler_step(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, *, previous_clean: Tensor, sigma_previous: Tensor
) -> Tensor:
    """First order: the step before does not matter."""
    return euler(x, v, sigma, sigma_next).mean


@torch.no_grad()
def denoise(
    policy: Policy,
    conditioning: Conditioning,
    *,
    kernel: TransitionKernel,
    stochastic_steps: Collection[int],
    num_steps: int,
    request: RolloutRequest,
    solver: Solver = euler_step,
) -> Trajectory:
    """Roll out B trajectories: `kernel` at the stochastic steps, the `solver` of the ODE elsewhere.

    Captures see the state before the step's noise is drawn, so credit made from them is state-measurable.

    Args:
        conditioning: B rows.
        request: of B rollouts; `clean_predictions` are recorded here, all other captures by the policy.
        solver: of the deterministic steps.

    Returns:
        A trajectory of B rollouts with T = `num_steps`; log-probabilities are exact for the latents stored.
    """
    noise, captures = request.noise, request.captures
    sigmas = policy.sigmas(num_steps, request.image_size).to(noise.device)
    latents = noise.initial(policy.latent_shape(request.image_size)) * sigmas[0]
    num_rollouts, _, height, width = latents.shape
    asked = captures - {CLEAN_PREDICTIONS}

    states, log_probs = [latents], []
    recorded: dict[str, list[Tensor]] = {name: [] for name in captures}
    previous_clean, sigma_previous = torch.zeros_like(latents), torch.ones_like(sigmas[0].expand(num_rollouts))
    for step in range(num_steps):
        sigma, sigma_next = sigmas[step].expand(num_rollouts), sigmas[step + 1].expand(num_rollouts)
        if asked:
            velocity, captured = policy.velocity_with_captures(latents, sigma, conditioning, asked)
            for name, value in captured.items():
                recorded[name].append(value)
        else:
            velocity = policy.velocity(latents, sigma, conditioning)
        clean = clean_prediction(latents, velocity, sigma)
        if CLEAN_PREDICTIONS in captures:
            recorded[CLEAN_PREDICTIONS].append(clean)
        if step in stochastic_steps:
            transition = kernel.transition(latents, velocity, sigma, sigma_next, sigma_max=float(sigmas[1]))
            latents = transition.mean + transition.std * noise.step(tuple(latents.shape[1:]))
            log_probs.append(kernel.log_prob_map(latents, transition))
        else:
            latents = solver(
                latents, velocity, sigma, sigma_next, previous_clean=previous_clean, sigma_previous=sigma_previous
            )
            log_probs.append(latents.new_zeros(1, 1, 1).expand(num_rollouts, height, width))
        states.append(latents)
        previous_clean, sigma_previous = clean, sigma

    stochastic = torch.zeros(num_steps, dtype=torch.bool, device=noise.device)
    stochastic[list(stochastic_steps)] = True
    no_log_probs = latents.new_zeros(1, 1, 1, 1).expand(num_rollouts, num_steps, height, width)
    return Trajectory(
        latents=torch.stack(states, dim=1),
        sigmas=sigmas,
        log_probs=torch.stack(log_probs, dim=1) if stochastic_steps else no_log_probs,
        stochastic=stochastic,
        kernel=kernel,
        conditioning=conditioning,
        group_size=request.group_size,
        captures={name: torch.stack(values, dim=1) for name, values in recorded.items()},
    )
