"""Reinforce Adjoint Matching: the pretraining regression, with a target that the reward has corrected."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from attrs import validators

from rlt2i.functional.gaussian import squared_error_map
from rlt2i.functional.reward_targets import reinforce_adjoint_target
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.forward import noisy_pairs
from rlt2i.objectives.reduction import masked_mean, on_grid, share_of_mean, trainable_steps
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class ReinforceAdjointMatching(Objective):
    """mean |v - sg(v_ref + s w A ((eps - x_0) - v))|^2  (RAM, arXiv 2605.10759).

    Any sampler will do, and one clean image serves several noise levels. The anchor is part of the target: without
    advantage the policy is fitted to the reference. The weight w of the credit scales the correction, so that places
    without credit stay with the reference; at v = v_ref the gradient is that of an advantage-weighted flow-matching
    loss.

    Attributes:
        strength: s, what an advantage of one is worth against the anchor: the inverse of the KL's temperature.
        sigmas: the noise levels trained at.
    """

    strength: float = attrs.field(default=1.0, validator=validators.gt(0))
    sigmas: SigmaDraws = attrs.field(factory=SigmaDraws)

    @property
    def needs(self) -> Needs:
        # A rollout without advantage pulls towards the reference.
        return Needs(parameter_sets={"reference"}, rows="valid")

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        keys = experience.keys
        sigma, step = self.sigmas.draw(experience, keys, context=context)
        kept = trainable_steps(experience, stochastic_only=False).gather(1, step)

        for rollouts, draws in context.micro_batches(kept):
            noisy = noisy_pairs(experience, rollouts, draws, sigma=sigma, step=step, noise_keys=keys, context=context)
            states, grid = noisy.states, noisy.grid
            velocity, reference = noisy.velocity(policy), noisy.velocity_under("reference", policy, context)

            correction = self.strength * on_grid(states.weight, grid) * on_grid(states.advantage, grid)
            target = reinforce_adjoint_target(velocity, reference, states.clean_latents, noisy.noise, correction)
            per_pair = masked_mean(squared_error_map(velocity, target), on_grid(states.mask.float(), grid) > 0)
            drift = squared_error_map(velocity.detach(), reference).mean(dim=(1, 2))
            metrics = {"loss/ram": per_pair.detach(), "kl/reference": drift}
            yield share_of_mean(per_pair, metrics, states.steps, kept=kept, rollouts=rollouts, context=context)
