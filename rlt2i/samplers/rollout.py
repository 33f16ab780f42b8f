"""The one denoising loop that every sampler shares."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from rlt2i.captures import EDGES
from rlt2i.functional.branching import Paths, separate_paths
from rlt2i.functional.transfer import on_both, to_device, with_twin
from rlt2i.functional.transitions import clean_prediction, euler
from rlt2i.interfaces import Policy, RolloutRequest
from rlt2i.types import Conditioning, Trajectory, TransitionKernel

MOST_STEPS = 10_000
"""Denoising steps of a rollout: more is a slip of the pen, and would fill the memory before anything else fails."""
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
    kernel: TransitionKernel | None,
    stochastic_steps: Collection[int],
    num_steps: int,
    request: RolloutRequest,
    solver: Solver = euler_step,
    paths: Paths | None = None,
) -> Trajectory:
    """Roll out B trajectories: `kernel` at the stochastic steps, the `solver` of the ODE elsewhere.

    Captures see the state before the step's noise is drawn, so credit made from them is state-measurable.

    Args:
        conditioning: B rows.
        kernel: of the stochastic steps; None where there are none.
        request: of B rollouts; `clean_predictions` and `edges` are recorded here, all other captures by the policy.
        solver: of the deterministic steps.
        paths: of one group, where rollouts share states and steps. Then whole groups must be asked for, each state is
            shown to the network once, and "edges" are recorded in any case. None keeps rollouts apart.

    Returns:
        A trajectory of B rollouts with T = `num_steps`; log-probabilities are exact for the latents stored.
    """
    noise, captures = request.noise, request.captures
    of_group = paths or separate_paths(request.group_size, num_steps, stochastic_steps)
    plan = of_group.of_groups(len(noise) // request.group_size)
    schedule = policy.sigmas(num_steps, request.image_size)
    sigmas = on_both(schedule, noise.device)
    initial = noise.initial(policy.latent_shape(request.image_size))
    if not plan.states[:, 0].equal(torch.arange(len(initial))):
        initial = initial[to_device(plan.states[:, 0], noise.device)]
    latents = policy.initial_latents(initial, sigmas[0])
    num_rollouts, _, height, width = latents.shape
    requested = captures - {CLEAN_PREDICTIONS, EDGES}
    draws = plan.edges >= 0
    noisy = to_device(draws, noise.device)
    noise.draw_ahead(tuple(latents.shape[1:]), int(draws.any(dim=0).sum()))

    states, log_probs = [latents], []
    recorded: dict[str, list[Tensor]] = {name: [] for name in captures - {EDGES}}
    previous_clean, sigma_previous = torch.zeros_like(latents), torch.ones_like(sigmas[0].expand(num_rollouts))
    for step in range(num_steps):
        sigma, sigma_next = sigmas[step].expand(num_rollouts), sigmas[step + 1].expand(num_rollouts)
        sigma = with_twin(sigma, schedule[step].expand(num_rollouts))  # guidance at some levels asks which they are
        velocity, captured = _velocity(policy, latents, sigma, conditioning, requested, plan.states[:, step])
        for name, value in captured.items():
            recorded[name].append(value)
        clean = clean_prediction(latents, velocity, sigma)
        if CLEAN_PREDICTIONS in captures:
            recorded[CLEAN_PREDICTIONS].append(clean)

        moved, log_prob = latents, latents.new_zeros(1, 1, 1).expand(num_rollouts, height, width)
        if not draws[:, step].all():
            moved = solver(
                latents, velocity, sigma, sigma_next, previous_clean=previous_clean, sigma_previous=sigma_previous
            )
        if draws[:, step].any():
            assert kernel is not None, "a step that draws noise has a kernel"
            transition = kernel.transition(latents, velocity, sigma, sigma_next, sigma_max=sigmas[1])
            # A rollout without noise (-1) gets somebody's, and is put back on the ODE below.
            drawn = transition.mean + transition.std * noise.step(tuple(latents.shape[1:]), plan.edges[:, step])
            here = noisy[:, step, None, None]
            moved = torch.where(here[:, None], drawn, moved)
            log_prob = torch.where(here, kernel.log_prob_map(drawn, transition), log_prob)
        latents = moved
        states.append(latents)
        log_probs.append(log_prob)
        previous_clean, sigma_previous = clean, sigma

    stochastic = torch.zeros(num_steps, dtype=torch.bool)
    stochastic[list(stochastic_steps)] = True
    no_log_probs = latents.new_zeros(1, 1, 1, 1).expand(num_rollouts, num_steps, height, width)
    stacked = {name: torch.stack(values, dim=1) for name, values in recorded.items()}
    if EDGES in captures or paths is not None:
        # Numbered within their group, so that they do not depend on what was rolled out together.
        stacked[EDGES] = to_device(of_group.edges.repeat(num_rollouts // request.group_size, 1), noise.device)
    return Trajectory(
        latents=torch.stack(states, dim=1),
        sigmas=sigmas,
        log_probs=torch.stack(log_probs, dim=1) if stochastic_steps else no_log_probs,
        stochastic=on_both(stochastic, noise.device),
        kernel=kernel,
        conditioning=conditioning,
        group_size=request.group_size,
        captures=stacked,
        noisy=noisy,
    )


def _velocity(
    policy: Policy, latents: Tensor, sigma: Tensor, conditioning: Conditioning, names: frozenset[str], states: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """[B, ...] velocity and captures of each rollout; those at the same state ask the network once.

    Args:
        states: [B] long, the first rollout that stands at the same state.
    """
    rows, place = states.unique(return_inverse=True)
    alone = len(rows) == len(states)
    if not alone:
        rows, place = to_device(rows, latents.device), to_device(place, latents.device)
        latents, sigma, conditioning = latents[rows], sigma[rows], conditioning.take(rows)
    if names:
        velocity, captured = policy.velocity_with_captures(latents, sigma, conditioning, names)
    else:
        velocity, captured = policy.velocity(latents, sigma, conditioning), {}
    if alone:
        return velocity, captured
    return velocity[place], {name: value[place] for name, value in captured.items()}
