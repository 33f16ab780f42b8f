"""Centred reward distillation: regress what the policy implicitly rewards on what was rewarded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import attrs
import torch
from attrs import validators

from rlt2i.functional.ema import ramp_decay
from rlt2i.functional.group_matching import CRDForm, crd_kl_weight, crd_loss, crd_reward_map
from rlt2i.functional.matching import nft_label
from rlt2i.functional.transfer import chosen
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.decay import Decay
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.forward import noisy_pairs, whole_groups
from rlt2i.objectives.penalty import VelocityPenalty
from rlt2i.objectives.reduction import share_of_mean, trainable_steps, weight_and_mask
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class CRD(Objective):
    """mean (beta (r - mean r) - (a - mean a))^2 clip / beta, r = mean_p w_p (error of old - error)_p.

    Centred reward distillation (arXiv 2603.14128). r is how much better than the old policy the velocity fits a
    finished image, an implicit reward up to a constant of the prompt; centring removes that constant. a is
    DiffusionNFT's label, A / (2 clip) + 1/2 in [0, 1]. Weight maps sit inside r.

    Attributes:
        beta: scale of the implicit reward.
        advantage_clip: the advantage at which the label a saturates.
        temperature: None centres on the mean; a number on the good and on the bad samples in turn, softmax(+-a / T).
        form: "mse", or "bce" of sigmoids.
        adaptive: divide each error by its own scale, without gradient.
        centre: over the rollouts of a prompt, or, as the public code does, over everything in a micro-batch: then
            results depend on micro_batch_size and on the number of processes.
        kl_penalty: towards the reference policy, of full weight for the best samples; the worst get 1e-4.
        sigmas: the noise levels trained at, drawn once per group.
        decay: of the old policy, "start_step-start_value-slope-end_value", or a `Decay`.
        sample_with: which weights sample.
    """

    beta: float = attrs.field(default=1.0, validator=validators.gt(0))
    advantage_clip: float = attrs.field(default=5.0, validator=validators.gt(0))
    temperature: float | None = attrs.field(
        default=None,
        validator=validators.optional(validators.gt(0)),
    )
    form: CRDForm = attrs.field(default="mse", validator=validators.in_(("mse", "bce")))
    adaptive: bool = True
    centre: Literal["group", "micro_batch"] = attrs.field(
        default="group", validator=validators.in_(("group", "micro_batch"))
    )
    kl_penalty: VelocityPenalty = attrs.field(factory=VelocityPenalty)
    sigmas: SigmaDraws = attrs.field(factory=SigmaDraws)
    decay: str | Decay = attrs.field(default="0-0.25-0.005-0.999")
    sample_with: Literal["online", "old"] = attrs.field(default="old", validator=validators.in_(("online", "old")))

    @decay.validator
    def _check_decay(self, _: Any, value: str | Decay) -> None:
        self._decay_at(0, value)

    @property
    def rollout_weights(self) -> Literal["online", "old"]:
        return self.sample_with

    @property
    def needs(self) -> Needs:
        # In a group without advantage all labels are 1/2: its implicit rewards are pulled together.
        return Needs(parameter_sets={"old"} | self.kl_penalty.parameter_sets, groups=True, rows="valid")

    def old_decay(self, optimizer_step: int) -> float:
        return self._decay_at(optimizer_step, self.decay)

    @staticmethod
    def _decay_at(optimizer_step: int, decay: str | Decay) -> float:
        return decay.at(optimizer_step) if isinstance(decay, Decay) else ramp_decay(optimizer_step, decay)

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        groups, keys = experience.groups, experience.keys
        sigma, step = self.sigmas.draw(experience, groups, context=context)
        kept = trainable_steps(experience, stochastic_only=False).gather(1, step)
        temperature = math.inf if self.temperature is None else self.temperature

        for rollouts, draws in whole_groups(experience, kept, context, who="CRD"):
            noisy = noisy_pairs(experience, rollouts, draws, sigma=sigma, step=step, noise_keys=keys, context=context)
            states, members = noisy.states, chosen(groups, rollouts)
            velocity, old = noisy.velocity(policy), noisy.velocity_under("old", policy, context)

            reward_map = crd_reward_map(velocity, old, states.clean_latents, noisy.noise, adaptive=self.adaptive)
            reward = (weight_and_mask(states, noisy.grid) * reward_map).mean(dim=(1, 2))
            label = nft_label(states.advantage.mean(dim=(1, 2)), clip=self.advantage_clip)
            together = members if self.centre == "group" else torch.zeros_like(members)
            loss = crd_loss(reward, label, together, beta=self.beta, temperature=temperature, form=self.form)
            per_pair = loss * self.advantage_clip / self.beta
            metrics = {
                "loss/crd": per_pair.detach(),
                "crd/implicit_reward": reward.detach(),
                "kl/old_v": (velocity - old).detach().pow(2).mean(dim=(1, 2, 3)),
            }

            strength = self.kl_penalty.weight
            per_pair, held = self.kl_penalty.add(
                per_pair, velocity, policy, states, context, latents=noisy.state, sigma=noisy.sigma,
                scale=crd_kl_weight(label, kl_beta=strength) if strength > 0 else None,
            )  # fmt: skip
            yield share_of_mean(per_pair, metrics | held, states.steps, kept=kept, rollouts=rollouts, context=context)
