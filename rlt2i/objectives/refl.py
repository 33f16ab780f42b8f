"""ReFL: one late step looks ahead to the finished image, and the reward's gradient flows through that step."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.functional.reward_backprop import last_steps, refl_loss
from rlt2i.functional.transitions import clean_prediction
from rlt2i.interfaces import Needs, Objective, Policy, Sampler, UpdateContext
from rlt2i.objectives.penalty import VelocityPenalty
from rlt2i.objectives.reduction import share, trainable_steps
from rlt2i.objectives.reward_backprop import rewarded, scale_credit_gradient
from rlt2i.seeds import uniform
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class ReFL(Objective):
    """grad_scale max(margin - r(x_t - sigma_t v), 0) + KL penalty, t a random late step.

    Reward feedback learning (ImageReward, arXiv 2304.05977). Until step t the rollout is taken as it was, so its stored
    state is all that is needed; the gradient flows through one call of the network, its one-step clean prediction, the
    decoder and the reward. Every rollout draws one unmasked step of the window, and takes its last unmasked step where
    the window has none. The advantage is not used, so groups need no spread; weight and mask apply to the gradient of
    the velocity.

    Attributes:
        margin: reward above which an image teaches nothing, in the unit of the reward.
        grad_scale: factor of the reward's loss.
        window: (first, last), last exclusive, the steps to draw from; None stands for the last quarter.
        kl_penalty: towards the reference policy. ReFL holds the policy back with its pretraining loss instead.
    """

    uses_advantage = False

    margin: float = 2.0
    grad_scale: float = attrs.field(default=1e-3, validator=validators.gt(0))
    window: tuple[int, int] | None = None
    kl_penalty: VelocityPenalty = attrs.field(factory=VelocityPenalty)

    def __attrs_post_init__(self) -> None:
        if self.window is not None and not 0 <= self.window[0] < self.window[1]:
            raise ValueError(f"ReFL(window={self.window}): 0 <= first < last must hold, last exclusive.")

    @property
    def needs(self) -> Needs:
        return Needs(reward={"gradient"}, parameter_sets=self.kl_penalty.parameter_sets, rows="valid")

    def trained_steps(self, sampler: Sampler) -> int:
        self._window(sampler.num_steps)
        return 1

    def _window(self, num_steps: int) -> tuple[int, int]:
        first, last = self.window or (3 * num_steps // 4, num_steps)
        if last > num_steps:
            raise ValueError(
                f"ReFL(window={self.window}): the sampler has {num_steps} steps. Use last <= {num_steps}, or "
                "window=None for the last quarter."
            )
        return first, last

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        chosen = self._draw(experience, context)
        for rollouts, steps in context.micro_batches(chosen):
            states = experience.step_batch(rollouts, steps)
            velocity = policy.velocity(states.latents, states.sigma, states.conditioning)
            clean = clean_prediction(states.latents, scale_credit_gradient(velocity, states), states.sigma)
            reward, metrics = rewarded(clean, experience, rollouts, context)
            hinge = refl_loss(reward, margin=self.margin)
            per_pair = self.grad_scale * hinge
            metrics |= {"loss/refl": per_pair.detach(), "backprop/above_margin": (hinge.detach() == 0).float()}

            per_pair, held = self.kl_penalty.add(
                per_pair, velocity, policy, states, context, latents=states.latents, sigma=states.sigma
            )
            yield Loss(
                value=(per_pair * share(chosen, rollouts, context.num_rollouts)).sum(),
                metrics=metrics | held,
                steps=steps,
            )

    def _draw(self, experience: Experience, context: UpdateContext) -> Tensor:
        """[B, T] bool: one unmasked step for each rollout that has any."""
        unmasked = trainable_steps(experience, stochastic_only=False)
        steps = torch.arange(unmasked.shape[1], device=unmasked.device)
        first, last = self._window(len(steps))
        within = unmasked & (steps >= first) & (steps < last)
        eligible = torch.where(within.any(dim=1, keepdim=True), within, last_steps(unmasked, 1))
        order = uniform(context.seeds("refl", experience.keys), (len(steps),), unmasked.device)
        drawn = torch.where(eligible, order, -1.0).argmax(dim=1, keepdim=True)
        return eligible & (steps == drawn)
