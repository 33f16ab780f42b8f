"""Online DPO: in every group, prefer the best image to the worst."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.functional.matching import flow_matching_error, noised
from rlt2i.functional.preference import dpo_logits, dpo_loss
from rlt2i.interfaces import Objective, Policy, UpdateContext
from rlt2i.objectives.draws import SigmaDraws, shared_noise
from rlt2i.objectives.reduction import on_grid
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class OnlineDPO(Objective):
    """L = -log sigmoid(-beta / 2 [(e_w - e_w^ref) - (e_l - e_l^ref)]), e = mean_p w_p |v - (eps - x_0)|^2.

    Diffusion-DPO (arXiv 2311.12908) for flows, on the pair of largest and smallest advantage of each group, with the
    same
    noise and noise level for both. Weight maps sit inside the logit. Where the advantage resolves steps, the pair is
    chosen for each noise level by the advantage of the nearest step. Groups whose advantages tie have no pair.

    Attributes:
        beta: strength of the preference, for errors that are means over latent dimensions.
        refresh_every: optimiser updates after which the anchor is set to the current policy; 0 keeps it for ever.
        sigmas: the noise levels trained at.
    """

    beta: float = attrs.field(default=100.0, validator=validators.gt(0))
    refresh_every: int = attrs.field(default=40, validator=validators.ge(0))
    sigmas: SigmaDraws = attrs.field(factory=SigmaDraws)

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"old", "groups"})

    def old_decay(self, num_updates: int) -> float:
        return 0.0 if self.refresh_every and num_updates % self.refresh_every == 0 else 1.0

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        trajectory = experience.trajectory
        shape, device = tuple(trajectory.latents.shape[2:]), trajectory.latents.device
        grid = (shape[1], shape[2])
        groups, members = experience.groups.unique(return_inverse=True)
        sigma, step = self.sigmas.draw(experience, groups, context=context)
        winners, losers, kept = _pairs(experience, members, step)

        for pair, draw in _halves(context, kept):
            level = sigma[pair, draw]
            noise = shared_noise(context, groups[pair], draw, shape, device)
            both = torch.cat([winners[pair, draw], losers[pair, draw]])
            pairs = experience.pairs(both, step[pair, draw].repeat(2))
            state = noised(pairs.clean_latents, noise.repeat(2, 1, 1, 1), level.repeat(2))

            velocity = policy.velocity(state, level.repeat(2), pairs.conditioning)
            with torch.no_grad(), context.weights("old"):
                anchor = policy.velocity(state, level.repeat(2), pairs.conditioning)
            error = flow_matching_error(velocity, pairs.clean_latents, noise.repeat(2, 1, 1, 1))
            anchor_error = flow_matching_error(anchor, pairs.clean_latents, noise.repeat(2, 1, 1, 1))
            weight = on_grid(pairs.weight * pairs.mask, grid)

            n = len(pair)
            logits = dpo_logits(
                error[:n], error[n:], anchor_error[:n], anchor_error[n:],
                beta=self.beta, weight_winner=weight[:n], weight_loser=weight[n:],
            )  # fmt: skip
            loss = dpo_loss(logits)
            yield Loss(
                value=loss.sum() / (context.num_groups * self.sigmas.count),
                metrics={
                    "loss/dpo": loss.detach(),
                    "dpo/accuracy": (logits > 0).float(),
                    "dpo/logit": logits.detach(),
                },
                steps=step[pair, draw],
            )


def _pairs(experience: Experience, members: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Winner and loser [groups, draws] of each group at each drawn step, and whether they differ."""
    advantage = experience.credit.advantage.mean(dim=(2, 3))  # [B, 1|T]
    at_step = advantage.expand(-1, experience.trajectory.num_steps)[:, step]  # [B, groups, draws]
    mine = members[:, None] == torch.arange(len(step), device=members.device)
    valid = (mine & experience.rewards.valid[:, None])[..., None]
    best, winners = torch.where(valid, at_step, -torch.inf).max(dim=0)
    worst, losers = torch.where(valid, at_step, torch.inf).min(dim=0)
    return winners, losers, best > worst


def _halves(context: UpdateContext, kept: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of pairs: each pair is two sequences."""
    half = attrs.evolve(context, max_sequences=max(1, context.max_sequences // 2))
    yield from half.micro_batches(kept)
