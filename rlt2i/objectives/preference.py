"""Diffusion-DPO on pairs from a group: what its objectives share; they differ in the anchor."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from rlt2i.functional.matching import flow_matching_error, noised
from rlt2i.functional.preference import dpo_logits, dpo_loss
from rlt2i.functional.transfer import on_both, on_host
from rlt2i.interfaces import Policy, UpdateContext
from rlt2i.objectives.draws import SigmaDraws, shared_noise
from rlt2i.objectives.reduction import trainable_steps, weight_and_mask
from rlt2i.types import Experience, Loss


def preference_losses(
    policy: Policy, experience: Experience, *, context: UpdateContext, beta: float, sigmas: SigmaDraws, anchor: str
) -> Iterator[Loss]:
    """-log sigmoid(-beta / 2 [(e_w - e_w^ref) - (e_l - e_l^ref)]) for one pair per group and drawn noise level.

    Args:
        beta: strength of the preference, for errors that are means over latent dimensions.
        sigmas: the noise levels; winner and loser share them and the noise.
        anchor: the parameter set that stands for ref.
    """
    trajectory = experience.trajectory
    shape, device = tuple(trajectory.latents.shape[2:]), trajectory.latents.device
    grid = (shape[1], shape[2])
    groups, members = (on_both(x, device) for x in on_host(experience.groups).unique(return_inverse=True))
    sigma, step = sigmas.draw(experience, groups, context=context)
    winners, losers, kept = _pairs(experience, members, step)

    for pair, draw in _halves(context, kept):
        level = sigma[pair, draw]
        noise = shared_noise(context, on_host(groups)[on_host(pair)], draw, shape, device)
        both = torch.cat([winners[pair, draw], losers[pair, draw]])
        pairs = experience.step_batch(both, step[pair, draw].repeat(2))
        state = noised(pairs.clean_latents, noise.repeat(2, 1, 1, 1), level.repeat(2))

        velocity = policy.velocity(state, level.repeat(2), pairs.conditioning)
        with torch.no_grad(), context.weights(anchor):
            anchored = policy.velocity(state, level.repeat(2), pairs.conditioning)
        error = flow_matching_error(velocity, pairs.clean_latents, noise.repeat(2, 1, 1, 1))
        anchor_error = flow_matching_error(anchored, pairs.clean_latents, noise.repeat(2, 1, 1, 1))
        weight = weight_and_mask(pairs, grid)

        n = len(pair)
        logits = dpo_logits(
            error[:n], error[n:], anchor_error[:n], anchor_error[n:],
            beta=beta, weight_winner=weight[:n], weight_loser=weight[n:],
        )  # fmt: skip
        loss = dpo_loss(logits)
        yield Loss(
            value=loss.sum() / (context.num_groups * sigmas.count),
            metrics={
                "loss/dpo": loss.detach(),
                "dpo/accuracy": (logits > 0).float(),
                "dpo/logit": logits.detach(),
            },
            steps=step[pair, draw],
        )


def _pairs(experience: Experience, members: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Winner and loser [groups, draws] of each group at each drawn step, masked ones apart, and whether they differ."""
    advantage = experience.credit.advantage.mean(dim=(2, 3))  # [B, 1|T]
    at_step = advantage.expand(-1, experience.trajectory.num_steps)[:, step]  # [B, groups, draws]
    own = members[:, None] == torch.arange(len(step), device=members.device)
    kept = trainable_steps(experience, stochastic_only=False)[:, step]
    valid = (own & experience.rewards.valid[:, None])[..., None] & kept
    best, winners = torch.where(valid, at_step, -torch.inf).max(dim=0)
    worst, losers = torch.where(valid, at_step, torch.inf).min(dim=0)
    return winners, losers, best > worst


def _halves(context: UpdateContext, kept: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of pairs: each pair is two sequences."""
    half = attrs.evolve(context, micro_batch_size=max(1, context.micro_batch_size // 2))
    yield from half.micro_batches(kept)
