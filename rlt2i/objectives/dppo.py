"""Flow-DPPO: no clip on a noisy ratio, but a mask by the exact divergence of the two Gaussian steps."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from attrs import validators

from rlt2i.functional.gaussian import kl_map
from rlt2i.functional.surrogate import flow_dppo_surrogate, pool_log_ratio
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.penalty import KLPenalty
from rlt2i.objectives.reduction import Granularity, masked_mean, on_grid, ratio_grid, trainable_steps
from rlt2i.objectives.reverse import (
    NO_LIKELIHOOD,
    at_ratio_grid,
    denoising_step,
    old_transition,
    surrogate_metrics,
)
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class FlowDPPO(Objective):
    """-mean A rho, but 0 where KL(now || old) >= threshold and the update would move even further away.

    Flow-DPPO (arXiv 2606.11025). Both steps are Gaussians of one width, so their divergence is known exactly, while a
    ratio of one sample is a noisy estimate of it. A divergence per location is exact too, so the threshold is the same
    at every granularity.

    Attributes:
        threshold: of the KL per latent coordinate; published 1e-5.
        ratio: granularity of ratio and mask.
        kl_penalty: towards the reference policy.
    """

    threshold: float = attrs.field(default=1e-5, validator=validators.gt(0))
    ratio: Granularity = attrs.field(default="sample", validator=validators.in_(("sample", "token", "location")))
    kl_penalty: KLPenalty = attrs.field(factory=KLPenalty)

    @property
    def needs(self) -> Needs:
        return Needs(noise=True, parameter_sets={"old"} | self.kl_penalty.parameter_sets, remedies=NO_LIKELIHOOD)

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        trajectory = experience.trajectory
        grid = ratio_grid(self.ratio, experience)
        trainable = trainable_steps(experience, stochastic_only=True)

        for rollouts, steps in context.micro_batches(trainable):
            states = experience.step_batch(rollouts, steps)
            now = denoising_step(policy, trajectory, states, again=context.on_policy)
            old = old_transition(policy, trajectory, states, now, context)
            density = trajectory.log_prob_map
            log_ratio_map = density(states.next_latents, now.transition) - density(states.next_latents, old).detach()
            divergence = pool_log_ratio(kl_map(now.transition.mean.detach(), old.mean, old.std), grid)

            log_ratio, weight, _ = at_ratio_grid(log_ratio_map, states, grid)
            mask = on_grid(states.mask.float(), grid) > 0
            surrogate = flow_dppo_surrogate(
                log_ratio, on_grid(states.advantage, grid), divergence, self.threshold, weight=weight
            )
            per_pair = masked_mean(surrogate.loss, mask)
            metrics = surrogate_metrics(surrogate, log_ratio, mask)
            metrics |= {"kl/old": divergence.mean(dim=(1, 2)), "kl/old_max": divergence.amax(dim=(1, 2))}

            per_pair, held = self.kl_penalty.add(per_pair, policy, trajectory, states, now, context)
            yield Loss(value=(per_pair / context.num_pairs).sum(), metrics=metrics | held, steps=steps)
