"""Clean images, noised again: what objectives on the forward process share."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from rlt2i.functional.matching import flow_matching_error, noised
from rlt2i.functional.transfer import on_both, on_host
from rlt2i.interfaces import Policy, UpdateContext
from rlt2i.objectives.draws import shared_noise
from rlt2i.types import Experience, StepBatch


@attrs.frozen(kw_only=True, eq=False)
class NoisyPairs:
    """The finished latents of N (rollout, draw) pairs at the noise level of the draw.

    Attributes:
        states: with the credit of the sampler step nearest to that noise level.
        sigma: [N].
        noise, state: [N, C, H, W]; state = (1 - sigma) x_0 + sigma noise.
    """

    states: StepBatch
    sigma: Tensor
    noise: Tensor
    state: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the latents, where these losses live."""
        return (self.state.shape[2], self.state.shape[3])

    def velocity(self, policy: Policy) -> Tensor:
        """[N, C, H, W]; gradients flow."""
        return policy.velocity(self.state, self.sigma, self.states.conditioning)

    def velocity_under(self, name: str, policy: Policy, context: UpdateContext) -> Tensor:
        """[N, C, H, W] of a named parameter set, without gradient."""
        with torch.no_grad(), context.weights(name):
            return self.velocity(policy)

    def error(self, velocity: Tensor) -> Tensor:
        """[N, H, W] flow-matching error of a velocity."""
        return flow_matching_error(velocity, self.states.clean_latents, self.noise)


def noisy_pairs(
    experience: Experience,
    rollouts: Tensor,
    draws: Tensor,
    *,
    sigma: Tensor,
    step: Tensor,
    noise_keys: Tensor,
    context: UpdateContext,
) -> NoisyPairs:
    """Noise N rollouts anew.

    Args:
        rollouts, draws: [N] long.
        sigma, step: [B, draws] from `SigmaDraws.draw`.
        noise_keys: [B] long; equal keys get equal noise at equal draws (`experience.groups` shares it in a group).
    """
    trajectory = experience.trajectory
    shape, device = tuple(trajectory.latents.shape[2:]), trajectory.latents.device
    states, level = experience.step_batch(rollouts, step[rollouts, draws]), sigma[rollouts, draws]
    keys = on_host(noise_keys)[on_host(rollouts)]
    noise = shared_noise(context, keys, on_host(draws), shape, device)
    return NoisyPairs(states=states, sigma=level, noise=noise, state=noised(states.clean_latents, noise, level))


def whole_groups(
    experience: Experience, kept: Tensor, context: UpdateContext, *, who: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches (rollouts [N], draws [N]) of one draw each that never split a group.

    Args:
        kept: [B, draws] bool, the pairs that take part.
        who: the objective's name, for the error.

    Raises:
        ValueError: when a group does not fit into a micro-batch.
    """
    groups, known = on_host(experience.groups), on_host(kept)
    for draw in range(kept.shape[1]):
        rows = known[:, draw].nonzero()[:, 0]
        rows = rows[groups[rows].argsort(stable=True)]
        _, sizes = groups[rows].unique_consecutive(return_counts=True)
        largest = max(sizes.tolist(), default=0)
        if largest > context.micro_batch_size:
            raise ValueError(
                f"{who} compares the rollouts of a group in one forward pass, and a group of {largest} does not "
                f"fit into {context.micro_batch_size} sequences. Use micro_batch_size >= {largest}, or a smaller "
                "group_size."
            )
        batch: list[Tensor] = []
        for group in rows.split(sizes.tolist()):
            if sum(map(len, batch)) + len(group) > context.micro_batch_size:
                yield _one_draw(batch, draw, kept, context)
                batch = []
            batch.append(group)
        if batch:
            yield _one_draw(batch, draw, kept, context)


def _one_draw(groups: list[Tensor], draw: int, kept: Tensor, context: UpdateContext) -> tuple[Tensor, Tensor]:
    rollouts = torch.cat(groups)
    draws = on_both(torch.full_like(rollouts, draw), kept.device)
    rollouts = on_both(rollouts, kept.device)
    context.handed_out(kept, rollouts)
    return rollouts, draws
