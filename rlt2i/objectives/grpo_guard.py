"""GRPO-Guard: log-ratios with their negative mean removed and their spread equal at every step."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.functional.gaussian import kl_map, log_prob_map
from rlt2i.functional.surrogate import clipped_surrogate, grpo_guard_log_ratio, scaled_clip_range
from rlt2i.functional.transitions import Transition
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
class GRPOGuard(Objective):
    """mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) / (-dt), log rho = (log p/p_old + b) std, b = KL per coordinate.

    GRPO-Guard (arXiv 2510.22319). The mean of log p/p_old over the noise is -b, so good images seldom reach the upper
    bound that should hold them back and bad ones reach the lower one early: +b removes that. The factor std makes the
    spread of log rho the same at every step, and 1 / (-dt) makes the gradient of every step about the same size. The
    log-ratio is that of the true Gaussian density, whatever the kernel's own convention (CPS drops the normaliser).

    Attributes:
        clip_range: eps of a ratio per sample, 2e-6 to 4e-6 for SD3.5; widened by sqrt(P) for a ratio over P cells, and
            by sqrt(mean w^2) where a map lies inside the ratio.
        ratio: granularity of the ratio.
        inverse_dt: divide the loss of a step by its length, as the paper does; Flow-Factory does not.
        kl_penalty: towards the reference policy; the paper has none.
    """

    clip_range: float = attrs.field(default=2e-6, validator=validators.gt(0))
    ratio: Granularity = attrs.field(default="sample", validator=validators.in_(("sample", "token", "location")))
    inverse_dt: bool = True
    kl_penalty: KLPenalty = attrs.field(factory=KLPenalty)

    @property
    def needs(self) -> Needs:
        return Needs(noise=True, parameter_sets={"old"} | self.kl_penalty.parameter_sets, remedies=NO_LIKELIHOOD)

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        trajectory = experience.trajectory
        grid = ratio_grid(self.ratio, experience)
        clip_range = scaled_clip_range(self.clip_range, grid[0] * grid[1])
        trainable = trainable_steps(experience, stochastic_only=True)

        for rollouts, steps in context.micro_batches(trainable):
            states = experience.step_batch(rollouts, steps)
            now = denoising_step(policy, trajectory, states, again=context.on_policy)
            old = old_transition(policy, trajectory, states, now, context)

            guarded = _guarded(states.next_latents, now.transition, old)
            log_ratio, weight, noise = at_ratio_grid(guarded, states, grid)
            mask = on_grid(states.mask.float(), grid) > 0
            surrogate = clipped_surrogate(log_ratio, on_grid(states.advantage, grid), clip_range * noise, weight=weight)
            per_pair = masked_mean(surrogate.loss, mask)
            if self.inverse_dt:
                per_pair = per_pair / (states.sigma - states.sigma_next)
            bias = kl_map(now.transition.mean.detach(), old.mean, old.std).mean(dim=(1, 2))
            metrics = surrogate_metrics(surrogate, log_ratio, mask) | {"guard/bias": bias}

            per_pair, held = self.kl_penalty.add(per_pair, policy, trajectory, states, now, context)
            yield Loss(value=(per_pair / context.num_pairs).sum(), metrics=metrics | held, steps=steps)


def _guarded(next_latents: Tensor, now: Transition, old: Transition) -> Tensor:
    """[N, H, W] normalised log-ratio; 0 where a kernel leaves no noise (the last step of CPS), like its log-density."""
    noisy = now.std > 0
    std = torch.where(noisy, now.std, 1)
    log_ratio = log_prob_map(next_latents, now.mean, std) - log_prob_map(next_latents, old.mean, std)
    return torch.where(noisy[:, 0], grpo_guard_log_ratio(log_ratio, now.mean, old.mean, std), 0)
