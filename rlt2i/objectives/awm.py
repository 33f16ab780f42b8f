"""Advantage weighted matching: flow-matching errors as log-likelihoods in a surrogate."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from attrs import validators
from torch import Tensor

from rlt2i.config import neutral
from rlt2i.functional.awm import AWMWeighting, awm_advantage, awm_log_likelihood
from rlt2i.functional.surrogate import clipped_surrogate, scaled_clip_range
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.decay import Decay, PiecewiseLinearDecay
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.forward import NoisyPairs, noisy_pairs
from rlt2i.objectives.penalty import VelocityPenalty
from rlt2i.objectives.reduction import Granularity, masked_mean, on_grid, ratio_grid, share_of_mean, trainable_steps
from rlt2i.objectives.reverse import Pooled, at_ratio_grid, surrogate_metrics
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class AWM(Objective):
    """max(-A' rho, -A' clip(rho, 1 - eps, 1 + eps)), rho = exp(l - l_old), l = -f(sigma, |v - (eps - x_0)|^2).

    Advantage weighted matching (arXiv 2509.25050): the flow-matching error of a finished image stands in for its
    log-likelihood, so any sampler will do. There is one ratio per rollout and noise level ("exp first").

    Attributes:
        weighting: f. "uniform" m, "t" sigma m, "t2" sigma^2 m, "huber" about sigma sqrt(m), "ghuber" about
            sigma m^power / power, which the authors use.
        power: of "ghuber".
        ratio: granularity; "sample" is the paper. The Huber forms are not linear in m: finer than a sample they bound
            the influence of each place instead of that of each image.
        clip_range: eps of a ratio per sample, widened by sqrt(P) for a ratio over P cells, and by sqrt(mean w^2) where
            a map lies inside the ratio; 1 hardly ever clips.
        advantage_clip, advantage_scale: A' = clamp(A, +-clip) / clip * scale.
        kl_penalty: towards the reference policy.
        ema_kl_weight: weight of the same distance to a slow average of the policy, refreshed once per
            rollout batch. It takes the place of the old policy, so a second update on the same rollouts needs 0.
        sigmas: the noise levels trained at.
        decay: how much of itself the slow average keeps; published min(.3, .001 s).
    """

    weighting: AWMWeighting = attrs.field(
        default="ghuber", validator=validators.in_(("uniform", "t", "t2", "huber", "ghuber"))
    )
    power: float = attrs.field(default=0.25, validator=validators.gt(0))
    ratio: Granularity = attrs.field(default="sample", validator=validators.in_(("sample", "token", "location")))
    clip_range: float = attrs.field(default=1.0, validator=validators.gt(0))
    advantage_clip: float = attrs.field(default=5.0, validator=validators.gt(0))
    advantage_scale: float = attrs.field(default=1.0, validator=validators.gt(0))
    kl_penalty: VelocityPenalty = attrs.field(factory=VelocityPenalty)
    ema_kl_weight: float = attrs.field(default=1.0, validator=validators.ge(0))
    sigmas: SigmaDraws = attrs.field(factory=SigmaDraws)
    decay: Decay = neutral(PiecewiseLinearDecay(decay=0.3, rate=0.001))

    @property
    def needs(self) -> Needs:
        # Both distances pull on every image, whatever it earned.
        pulling = self.kl_penalty.weight + self.ema_kl_weight > 0
        sets = {"old"} | self.kl_penalty.parameter_sets
        return Needs(parameter_sets=sets, rows="valid" if pulling else "advantage")

    def old_decay(self, optimizer_step: int) -> float:
        return self.decay.at(optimizer_step) if self.ema_kl_weight > 0 else 0.0

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        if not context.on_policy and self.ema_kl_weight > 0:
            raise ValueError(
                f"AWM(ema_kl_weight={self.ema_kl_weight}): the old weights are the slow average, so the ratio of a "
                "second step on the same rollouts cannot be measured. Use optimizer_steps_per_iteration=1, or "
                "ema_kl_weight=0."
            )
        keys = experience.keys
        grid = ratio_grid(self.ratio, experience)
        clip_range = scaled_clip_range(self.clip_range, grid[0] * grid[1])
        sigma, step = self.sigmas.draw(experience, keys, context=context)
        kept = trainable_steps(experience, stochastic_only=False).gather(1, step)

        for rollouts, draws in context.micro_batches(kept):
            noisy = noisy_pairs(experience, rollouts, draws, sigma=sigma, step=step, noise_keys=keys, context=context)
            states = noisy.states
            velocity = noisy.velocity(policy)
            likelihood, weight, noise = self._log_likelihood(noisy, velocity, grid)
            if context.on_policy:
                old_likelihood = likelihood.detach()
            else:
                old_likelihood = self._log_likelihood(noisy, noisy.velocity_under("old", policy, context), grid).values

            log_ratio = likelihood - old_likelihood
            advantage = awm_advantage(states.advantage, clip=self.advantage_clip, scale=self.advantage_scale)
            mask = on_grid(states.mask.float(), grid) > 0
            surrogate = clipped_surrogate(log_ratio, on_grid(advantage, grid), clip_range * noise, weight=weight)
            per_pair = masked_mean(surrogate.loss, mask)
            metrics = surrogate_metrics(surrogate, log_ratio, mask)
            metrics["log_likelihood"] = likelihood.detach().mean(dim=(1, 2))

            per_pair, held = self.kl_penalty.add(
                per_pair, velocity, policy, states, context, latents=noisy.state, sigma=noisy.sigma
            )
            if self.ema_kl_weight > 0:
                average = noisy.velocity_under("old", policy, context)
                drift = self.kl_penalty.distance(velocity, average, states, noisy.sigma)
                per_pair = per_pair + self.ema_kl_weight * drift
                metrics["kl/old"] = drift.detach()

            yield share_of_mean(per_pair, metrics | held, states.steps, kept=kept, rollouts=rollouts, context=context)

    def _log_likelihood(self, noisy: NoisyPairs, velocity: Tensor, grid: tuple[int, int]) -> Pooled:
        """l of the error pooled to the grid."""
        error = at_ratio_grid(noisy.error(velocity), noisy.states, grid)
        likelihood = awm_log_likelihood(error.values, noisy.sigma, weighting=self.weighting, power=self.power)
        return error._replace(values=likelihood)
