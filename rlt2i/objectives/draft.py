"""DRaFT: the reward's gradient through the last steps of the sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.functional.matching import noised
from rlt2i.functional.reward_backprop import last_steps, random_depth, scale_gradient
from rlt2i.functional.transfer import chosen, on_both, on_host
from rlt2i.functional.transitions import euler
from rlt2i.interfaces import Needs, Objective, Policy, Sampler, UpdateContext
from rlt2i.objectives.draws import shared_noise
from rlt2i.objectives.penalty import VelocityPenalty
from rlt2i.objectives.reduction import share, trainable_steps
from rlt2i.objectives.reward_backprop import rewarded, scale_credit_gradient
from rlt2i.seeds import uniform
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class DRaFT(Objective):
    """-r(x_0), the last K steps x' = x + v dt taken again with gradient, + KL penalty.

    DRaFT-K (arXiv 2309.17400): d r / d theta = sum over the last K steps of (d v_t / d theta)^T g_t, where g_t is the
    reward's gradient that reaches the velocity of step t. The rollout's stored state T - K is where it starts; any
    sampler will do, the steps taken again are those of the ODE. The advantage is not used, so groups need no spread;
    weight and mask of step t apply to g_t. A step that is masked everywhere is a detached velocity and does not count:
    K is the number of unmasked steps.

    Attributes:
        steps: K. Activations of K network calls are held at once; micro-batches are smaller by that factor.
        truncation: "fixed" is DRaFT; "random" draws 1..K steps anew for each rollout (AlignProp, arXiv 2310.03739).
        detach_input: let no gradient through the input of the network, so that it does not multiply from step to step
            (DRTune).
        renoised: DRaFT-LV, for K = 1: the mean over the stored step and so many copies of it, each from the finished
            latents noised anew.
        kl_penalty: towards the reference policy, the mean over the K steps.
    """

    uses_advantage = False

    steps: int = attrs.field(default=1, validator=validators.ge(1))
    truncation: Literal["fixed", "random"] = attrs.field(default="fixed", validator=validators.in_(("fixed", "random")))
    detach_input: bool = False
    renoised: int = attrs.field(default=0, validator=validators.ge(0))
    kl_penalty: VelocityPenalty = attrs.field(factory=VelocityPenalty)

    def __attrs_post_init__(self) -> None:
        if self.renoised and self.steps > 1:
            raise ValueError(
                f"DRaFT(steps={self.steps}, renoised={self.renoised}): the copies are of the last step alone. Use "
                "steps=1, or renoised=0."
            )

    @property
    def needs(self) -> Needs:
        return Needs(reward={"gradient"}, parameter_sets=self.kl_penalty.parameter_sets, rows="valid")

    def trained_steps(self, sampler: Sampler) -> int:
        self._check(sampler.num_steps)
        return self.steps * (1 + self.renoised)

    def _check(self, num_steps: int) -> None:
        if self.steps > num_steps:
            raise ValueError(f"DRaFT(steps={self.steps}): the sampler has {num_steps} steps. Use steps <= {num_steps}.")

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        self._check(experience.trajectory.num_steps)
        device = experience.trajectory.latents.device
        known = on_host(self._learning(experience, context))
        learning = on_both(known, device)
        starts = on_both(known.any(dim=1, keepdim=True).expand(-1, 1 + self.renoised), device)
        held = int(known.any(dim=0).sum())

        for rollouts, copies in context.micro_batches(starts, passes=max(1, held)):
            finished, divergence = self._finish(
                policy, experience, rollouts, copies, chosen(learning, rollouts), context
            )
            reward, metrics = rewarded(finished, experience, rollouts, context)
            per_pair = -reward
            metrics["loss/draft"] = per_pair.detach()
            if self.kl_penalty.weight > 0:
                per_pair, penalty = self.kl_penalty.plus(per_pair, divergence)
                metrics |= penalty
            yield Loss(value=(per_pair * share(starts, rollouts, context.num_rollouts)).sum(), metrics=metrics)

    def _learning(self, experience: Experience, context: UpdateContext) -> Tensor:
        """[B, T] bool: the steps whose velocity has a gradient."""
        unmasked = trainable_steps(experience, stochastic_only=False)
        if self.truncation == "fixed":
            return last_steps(unmasked, self.steps)
        draws = uniform(context.seeds("draft", experience.keys), (), unmasked.device)
        return last_steps(unmasked, random_depth(draws, self.steps))

    def _finish(
        self,
        policy: Policy,
        experience: Experience,
        rollouts: Tensor,
        copies: Tensor,
        learning: Tensor,
        context: UpdateContext,
    ) -> tuple[Tensor, Tensor]:
        """Take the steps again from each rollout's first learning step on.

        Args:
            rollouts, copies: [N] long.
            learning: [N, T] bool.

        Returns:
            [N, C, H, W] finished latents with gradient, and [N] the mean distance from the reference at the steps that
            learn.
        """
        latents = torch.empty_like(experience.trajectory.latents[rollouts, 0])
        divergence = latents.new_zeros(len(latents))
        known = on_host(learning)
        for step in range(int(known.any(dim=0).long().argmax()), learning.shape[1]):
            begun = learning[:, :step].any(dim=1)[:, None, None, None]
            latents = torch.where(begun, latents, self._start(experience, rollouts, copies, step, context))
            states, learns = experience.step_batch(rollouts, torch.full_like(rollouts, step)), learning[:, step]
            observed = latents.detach() if self.detach_input else latents
            some = bool(known[:, step].any())
            with torch.set_grad_enabled(some):
                velocity = policy.velocity(observed, states.sigma, states.conditioning)
            if self.kl_penalty.weight > 0 and some:
                with torch.no_grad(), context.weights("reference"):
                    reference = policy.velocity(observed, states.sigma, states.conditioning)
                divergence = divergence + learns * self.kl_penalty.distance(velocity, reference, states, states.sigma)
            learned = scale_gradient(scale_credit_gradient(velocity, states), learns[:, None, None, None].float())
            latents = euler(latents, learned, states.sigma, states.sigma_next).mean
        return latents, divergence / learning.sum(dim=1)

    def _start(
        self, experience: Experience, rollouts: Tensor, copies: Tensor, step: int, context: UpdateContext
    ) -> Tensor:
        """[N, C, H, W] states before a step: copy 0 is the stored one, the others are noised anew."""
        trajectory = experience.trajectory
        stored = trajectory.latents[rollouts, step]
        if not self.renoised:
            return stored
        shape, device = tuple(stored.shape[1:]), stored.device
        noise = shared_noise(context, on_host(experience.keys)[on_host(rollouts)], copies, shape, device)
        anew = noised(trajectory.latents[rollouts, -1], noise, trajectory.sigmas[step])
        return torch.where(copies[:, None, None, None] > 0, anew, stored)
