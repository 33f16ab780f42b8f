"""The one denoising loop that every sampler shares."""

from __future__ import annotations

from collections.abc import Collection

import torch

from rlt2i.functional.transitions import clean_prediction, euler
from rlt2i.interfaces import Policy
from rlt2i.seeds import RolloutNoise
from rlt2i.types import Conditioning, Trajectory, TransitionKernel

CLEAN_PREDICTIONS = "clean_predictions"
"""Capture [B, T, C, H, W]: the one-step estimate of x_0 before each step (Tweedie)."""


@torch.no_grad()
def denoise(
    policy: Policy,
    conditioning: Conditioning,
    *,
    kernel: TransitionKernel,
    stochastic_steps: Collection[int],
    num_steps: int,
    image_size: int,
    noise: RolloutNoise,
    captures: frozenset[str],
    group_size: int,
) -> Trajectory:
    """Roll out B trajectories: `kernel` at the stochastic steps, Euler's ODE step elsewhere.

    Captures see the state before the step's noise is drawn, so credit made from them is state-measurable.

    Args:
        conditioning: B rows.
        noise: of B rollouts.
        captures: what to record: `clean_predictions` here, everything else by the policy.

    Returns:
        A trajectory of B rollouts with T = `num_steps`; log-probabilities are exact for the latents stored.
    """
    sigmas = policy.sigmas(num_steps, image_size).to(noise.device)
    latents = noise.initial(policy.latent_shape(image_size)) * sigmas[0]
    num_rollouts, _, height, width = latents.shape
    asked = captures - {CLEAN_PREDICTIONS}

    states, log_probs = [latents], []
    recorded: dict[str, list[torch.Tensor]] = {name: [] for name in captures}
    for step in range(num_steps):
        sigma, sigma_next = sigmas[step].expand(num_rollouts), sigmas[step + 1].expand(num_rollouts)
        if asked:
            velocity, captured = policy.velocity_with_captures(latents, sigma, conditioning, asked)
            for name, value in captured.items():
                recorded[name].append(value)
        else:
            velocity = policy.velocity(latents, sigma, conditioning)
        if CLEAN_PREDICTIONS in captures:
            recorded[CLEAN_PREDICTIONS].append(clean_prediction(latents, velocity, sigma))
        if step in stochastic_steps:
            transition = kernel.transition(latents, velocity, sigma, sigma_next, sigma_max=float(sigmas[1]))
            latents = transition.mean + transition.std * noise.step(tuple(latents.shape[1:]))
            log_probs.append(kernel.log_prob_map(latents, transition))
        else:
            latents = euler(latents, velocity, sigma, sigma_next).mean
            log_probs.append(latents.new_zeros(1, 1, 1).expand(num_rollouts, height, width))
        states.append(latents)

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
        group_size=group_size,
        captures={name: torch.stack(values, dim=1) for name, values in recorded.items()},
    )
