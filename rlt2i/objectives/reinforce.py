"""The plain policy gradient: no ratio, no clip."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from rlt2i.functional.surrogate import reinforce
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.penalty import KLPenalty
from rlt2i.objectives.reduction import masked_mean, on_grid, ratio_grid, trainable_steps
from rlt2i.objectives.reverse import NO_LIKELIHOOD, denoising_step
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class Reinforce(Objective):
    """-mean w A log p, once per rollout batch (Williams 1992; DDPO's REINFORCE variant, arXiv 2305.13301).

    Its gradient is that of `ClippedSurrogate` on policy, at every granularity. It has no correction for data of an
    older policy, so a second update on the same rollouts is refused.

    Attributes:
        kl_penalty: towards the reference policy.
    """

    kl_penalty: KLPenalty = attrs.field(factory=KLPenalty)

    @property
    def needs(self) -> Needs:
        return Needs(noise=True, parameter_sets=self.kl_penalty.parameter_sets, remedies=NO_LIKELIHOOD)

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        if not context.on_policy:
            raise ValueError(
                "Reinforce: the weights are no longer those of the rollout, and without a ratio nothing corrects for "
                "it. Use optimizer_steps_per_iteration=1, or ClippedSurrogate()."
            )
        trajectory = experience.trajectory
        grid = ratio_grid("location", experience)
        trainable = trainable_steps(experience, stochastic_only=True)

        for rollouts, steps in context.micro_batches(trainable):
            states = experience.step_batch(rollouts, steps)
            now = denoising_step(policy, trajectory, states, again=context.on_policy)
            log_prob = trajectory.log_prob_map(states.next_latents, now.transition)
            loss_map = reinforce(log_prob, on_grid(states.advantage, grid), weight=on_grid(states.weight, grid))
            per_pair = masked_mean(loss_map, on_grid(states.mask.float(), grid) > 0)
            metrics = {"loss/reinforce": per_pair.detach(), "log_prob/mean": log_prob.detach().mean(dim=(1, 2))}

            per_pair, held = self.kl_penalty.add(per_pair, policy, trajectory, states, now, context)
            yield Loss(value=(per_pair / context.num_pairs).sum(), metrics=metrics | held, steps=steps)
