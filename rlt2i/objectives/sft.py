"""Supervised fine-tuning on one's own samples: flow matching, weighted by how good they were."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from rlt2i.functional.matching import weighted_matching_loss_map
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.forward import noisy_pairs
from rlt2i.objectives.penalty import VelocityPenalty
from rlt2i.objectives.reduction import on_grid, share_of_mean, trainable_steps, weight_and_mask
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class WeightedMatching(Objective):
    """mean w A+ |v - (eps - x_0)|^2 + KL penalty, A+ = max(A, 0).

    With the raw reward as advantage this is reward-weighted regression, with 1[best of group] it is supervised
    fine-tuning on the best image (the two baselines of Flow-GRPO, arXiv 2505.05470). A negative A would push the
    policy away from a sample without bound, since minus a squared error has no minimum; such rollouts are left out,
    though not out of the denominator. Use AWM or DiffusionNFT to learn from them.

    Attributes:
        kl_penalty: towards the reference policy.
        sigmas: the noise levels trained at.
    """

    kl_penalty: VelocityPenalty = attrs.field(factory=VelocityPenalty)
    sigmas: SigmaDraws = attrs.field(factory=SigmaDraws)

    @property
    def needs(self) -> Needs:
        pulling = self.kl_penalty.weight > 0
        return Needs(parameter_sets=self.kl_penalty.parameter_sets, rows="valid" if pulling else "advantage")

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        keys = experience.keys
        sigma, step = self.sigmas.draw(experience, keys, context=context)
        kept = trainable_steps(experience, stochastic_only=False).gather(1, step)
        praised = (experience.credit.advantage > 0).flatten(2).any(dim=2)
        praised = praised.expand(-1, experience.trajectory.num_steps).gather(1, step)
        worthwhile = kept if self.kl_penalty.weight > 0 else kept & praised

        for rollouts, draws in context.micro_batches(worthwhile):
            noisy = noisy_pairs(experience, rollouts, draws, sigma=sigma, step=step, noise_keys=keys, context=context)
            states, grid = noisy.states, noisy.grid
            velocity = noisy.velocity(policy)
            error = noisy.error(velocity)

            advantage = on_grid(states.advantage, grid).clamp(min=0)
            loss_map = weighted_matching_loss_map(error, advantage, weight=weight_and_mask(states, grid))
            per_pair = loss_map.mean(dim=(1, 2))
            metrics = {
                "loss/matching": per_pair.detach(),
                "error/velocity": error.detach().mean(dim=(1, 2)),
            }

            per_pair, held = self.kl_penalty.add(
                per_pair, velocity, policy, states, context, latents=noisy.state, sigma=noisy.sigma
            )
            yield share_of_mean(per_pair, metrics | held, states.steps, kept=kept, rollouts=rollouts, context=context)
