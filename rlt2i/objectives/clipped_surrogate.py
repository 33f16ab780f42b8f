"""The clipped surrogate of Flow-GRPO, with a ratio per sample, image token or latent location."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.functional.gaussian import reference_kl_map
from rlt2i.functional.surrogate import clipped_surrogate, pool_log_ratio, scaled_clip_range
from rlt2i.functional.transitions import Transition
from rlt2i.interfaces import Objective, Policy, UpdateContext
from rlt2i.objectives.reduction import Granularity, masked_mean, on_grid, ratio_grid, share, trainable_steps
from rlt2i.types import Experience, Loss, Pairs


@attrs.frozen(kw_only=True)
class ClippedSurrogate(Objective):
    """mean w max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + kl_weight KL(policy || reference).

    PPO's surrogate (arXiv 1707.06347) on denoising steps (Flow-GRPO, arXiv 2505.05470). The weight w of the credit
    enters at its own resolution: where the ratio is finer than the map, w multiplies the loss of each cell; where it is
        coarser,
    w weights the log-probabilities that are pooled into the ratio. On policy both have the gradient A mean_p w_p grad
    l_p.

    Attributes:
        clip_range: eps of a ratio per *sample*; a ratio over P cells gets eps sqrt(P), because the noise of a mean
            log-ratio grows with the square root of the number of coordinates that are no longer averaged.
        ratio: granularity of the ratio.
        kl_weight: beta of the penalty towards the reference policy.
        kl: its form; "flow_grpo" is |dt| times the true KL per dimension, as the published betas assume.
    """

    clip_range: float = attrs.field(default=1e-4, validator=validators.gt(0))
    ratio: Granularity = attrs.field(default="location", validator=validators.in_(("sample", "token", "location")))
    kl_weight: float = attrs.field(default=0.0, validator=validators.ge(0))
    kl: Literal["flow_grpo", "exact", "v", "x"] = "flow_grpo"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"log_probs", "reference"} if self.kl_weight > 0 else {"log_probs"})

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        trajectory = experience.trajectory
        grid = ratio_grid(self.ratio, experience)
        clip_range = scaled_clip_range(self.clip_range, grid[0] * grid[1])
        trainable = trainable_steps(experience, stochastic_only=True)

        for rollouts, steps in context.micro_batches(trainable):
            pairs = experience.pairs(rollouts, steps)
            velocity = policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning)
            transition = trajectory.kernel.transition(
                pairs.latents, velocity, pairs.sigma, pairs.sigma_next, sigma_max=trajectory.sigma_max
            )
            log_prob = trajectory.kernel.log_prob_map(pairs.next_latents, transition)
            old_log_prob = log_prob.detach() if context.on_policy else pairs.old_log_probs

            log_ratio, weight = self._at_ratio_grid(log_prob - old_log_prob, pairs.weight, grid)
            advantage = on_grid(pairs.advantage, grid)
            mask = on_grid(pairs.mask.float(), grid) > 0
            surrogate = clipped_surrogate(log_ratio, advantage, clip_range, weight=weight)
            per_pair = masked_mean(surrogate.loss, mask)
            metrics = {
                "ratio/abs_minus_one_max": (surrogate.ratio - 1).abs().amax(dim=(1, 2)),
                "ratio/abs_log": log_ratio.detach().abs().mean(dim=(1, 2)),
                "clip/high": masked_mean(surrogate.clipped_high.float(), mask),
                "clip/low": masked_mean(surrogate.clipped_low.float(), mask),
            }

            if self.kl_weight > 0:
                divergence = self._kl(policy, experience, pairs, velocity, transition, context)
                per_pair = per_pair + self.kl_weight * divergence
                metrics["kl/reference"] = divergence.detach()

            yield Loss(
                value=(per_pair * share(trainable, rollouts, context.num_rollouts)).sum(),
                metrics={name: value.detach() for name, value in metrics.items()},
                steps=steps,
            )

    def _at_ratio_grid(self, log_ratio_map: Tensor, weight: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Pool the log-ratio to the grid; the weight goes inside the pool where it is finer than the grid."""
        height, width = log_ratio_map.shape[1:]
        finer = weight.shape[1] > grid[0] or weight.shape[2] > grid[1]
        if finer:
            inside = on_grid(weight, (height, width)) * log_ratio_map
            return pool_log_ratio(inside, grid), weight.new_ones(1, 1, 1)
        return pool_log_ratio(log_ratio_map, grid), on_grid(weight, grid)

    def _kl(
        self,
        policy: Policy,
        experience: Experience,
        pairs: Pairs,
        velocity: Tensor,
        transition: Transition,
        context: UpdateContext,
    ) -> Tensor:
        trajectory = experience.trajectory
        with torch.no_grad(), context.weights("reference"):
            reference = policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning)
        reference_step = trajectory.kernel.transition(
            pairs.latents, reference, pairs.sigma, pairs.sigma_next, sigma_max=trajectory.sigma_max
        )
        return reference_kl_map(transition, reference_step, velocity, reference, form=self.kl).mean(dim=(1, 2))
