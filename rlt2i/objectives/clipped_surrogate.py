"""The clipped surrogate of Flow-GRPO, with a ratio per sample, image token or latent location."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import attrs
import torch
from attrs import validators

from rlt2i.config import neutral
from rlt2i.functional.surrogate import clipped_surrogate, detached_log_ratio, scaled_clip_range
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.penalty import KLPenalty
from rlt2i.objectives.reduction import Granularity, masked_mean, on_grid, ratio_grid, trainable_steps
from rlt2i.objectives.reverse import (
    NO_LIKELIHOOD,
    at_ratio_grid,
    denoising_step,
    surrogate_metrics,
    whole_sample,
)
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class ClippedSurrogate(Objective):
    """mean w max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + KL penalty.

    PPO's surrogate (arXiv 1707.06347) on denoising steps (Flow-GRPO, arXiv 2505.05470). The weight w of the credit
    enters at its own resolution: where the ratio is finer than the map, w multiplies the loss of each cell; where it
    is coarser, w weights the log-probabilities that are pooled into the ratio. On policy both have the gradient
    A mean_p w_p grad l_p. An advantage that resolves places has one sign per place: give each its ratio, since a
    coarser ratio can only take their mean.

    The published per-location objective of ViPO (arXiv 2511.18719), mean_p min(rho_p M_p A, clip(rho_p, 1 +- eps) M_p
    A), is ratio="location", channels="sum", clip_at="ratio" under a credit whose weight is M.

    Attributes:
        clip_range: eps of a ratio per *sample*; a ratio over P cells gets eps sqrt(P), because the noise of a mean
            log-ratio grows with the square root of the number of coordinates that are no longer averaged. A map inside
            a coarser ratio makes it noisier by sqrt(mean w^2), and widens the range of that pair as much.
        ratio: its granularity: one per "sample", per image "token" or per latent "location".
        form: "direct", each ratio its own value and gradient; "detached", the value of the whole sample's ratio with
            the gradient of the place (DenseFlow-GRPO, arXiv 2510.01010), clipped as a ratio per sample is.
        channels: "mean", as the log-probability is everywhere here, or "sum" over the C channels of a place, which
            makes log-ratios C times as large; `clip_range` is then of a mean nevertheless, unless `clip_at` is "ratio".
        clip_at: "sample", where `clip_range` is carried to the ratio in use, eps sqrt(P) and times C for sums; or
            "ratio", where it is that ratio's own range as it stands.
        kl_penalty: towards the reference policy.
    """

    clip_range: float = attrs.field(default=1e-4, validator=validators.gt(0))
    ratio: Granularity = attrs.field(default="location", validator=validators.in_(("sample", "token", "location")))
    form: Literal["direct", "detached"] = neutral("direct", validator=validators.in_(("direct", "detached")))
    channels: Literal["mean", "sum"] = neutral("mean", validator=validators.in_(("mean", "sum")))
    clip_at: Literal["sample", "ratio"] = neutral("sample", validator=validators.in_(("sample", "ratio")))
    kl_penalty: KLPenalty = attrs.field(factory=KLPenalty)

    @property
    def needs(self) -> Needs:
        return Needs(
            noise=True,
            old_log_probs=True,
            parameter_sets=self.kl_penalty.parameter_sets,
            remedies=NO_LIKELIHOOD,
        )

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        trajectory = experience.trajectory
        grid = ratio_grid(self.ratio, experience)
        summed = trajectory.latents.shape[2] if self.channels == "sum" else 1
        clip_range = self._clip_range(grid, summed)
        trainable = trainable_steps(experience, stochastic_only=True)

        for rollouts, steps in context.micro_batches(trainable):
            states = experience.step_batch(rollouts, steps)
            now = denoising_step(policy, trajectory, states, again=context.on_policy)
            log_prob = trajectory.log_prob_map(states.next_latents, now.transition)
            old_log_prob = log_prob.detach() if context.on_policy else states.old_log_probs

            difference = summed * (log_prob - old_log_prob)
            log_ratio, weight, noise = at_ratio_grid(difference, states, grid)
            if self.form == "detached":
                log_ratio = detached_log_ratio(log_ratio, whole_sample(difference, states))
            if self.form == "detached" or self.clip_at == "ratio":
                noise = torch.ones_like(noise)
            mask = on_grid(states.mask.float(), grid) > 0
            surrogate = clipped_surrogate(log_ratio, on_grid(states.advantage, grid), clip_range * noise, weight=weight)
            per_pair = masked_mean(surrogate.loss, mask)
            metrics = surrogate_metrics(surrogate, log_ratio, mask)

            per_pair, held = self.kl_penalty.add(per_pair, policy, trajectory, states, now, context)
            yield Loss(value=(per_pair / context.num_pairs).sum(), metrics=metrics | held, steps=steps)

    def _clip_range(self, grid: tuple[int, int], summed: int) -> float:
        """Of the ratio that is used."""
        if self.clip_at == "ratio":
            return self.clip_range
        cells = 1 if self.form == "detached" else grid[0] * grid[1]
        return scaled_clip_range(self.clip_range, cells, summed=summed)
