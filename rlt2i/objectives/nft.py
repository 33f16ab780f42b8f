"""DiffusionNFT: reinforcement on the forward process, with a positive and a negative branch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import attrs
import torch
from attrs import validators

from rlt2i.functional.ema import nft_old_decay
from rlt2i.functional.matching import nft_label, nft_loss_map
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.decay import Decay
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.forward import noisy_pairs
from rlt2i.objectives.penalty import VelocityPenalty
from rlt2i.objectives.reduction import masked_mean, on_grid, share_of_mean, trainable_steps
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class DiffusionNFT(Objective):
    """L = clip / beta (r l+ + (1 - r) l-), v+- = v_old +- beta (v - v_old)  (arXiv 2509.16117).

    Needs no trajectory and no likelihood: any sampler will do. At v = v_old the gradient is that of an
    advantage-weighted flow-matching loss. STAR-NFT is this objective with a text-attention credit; nobody has
    published it.

    Attributes:
        beta: mixing strength of the branches.
        advantage_clip: the advantage at which the label saturates.
        spatial: how a weight map enters. "weight" scales the loss of a location on both branches; "label" scales the
            advantage before it becomes a label, so that places without credit say "no preference" and stay anchored.
        label: what the advantage is replaced by ("all" keeps it).
        kl_penalty: towards the reference policy.
        sigmas: the noise levels trained at.
        decay: schedule of the old policy: 0 follows at once, 1 is min(.001 s, .5), 2 waits 75 updates; or a constant
            share below 1; or a `Decay`.
        sample_with: which weights sample.
    """

    beta: float = attrs.field(default=1.0, validator=validators.gt(0))
    advantage_clip: float = attrs.field(default=5.0, validator=validators.gt(0))
    spatial: Literal["weight", "label"] = attrs.field(default="weight", validator=validators.in_(("weight", "label")))
    label: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    kl_penalty: VelocityPenalty = attrs.field(factory=VelocityPenalty)
    sigmas: SigmaDraws = attrs.field(factory=SigmaDraws)
    decay: Literal[0, 1, 2] | float | Decay = attrs.field(default=1)
    sample_with: Literal["online", "old"] = "old"

    @decay.validator
    def _check_decay(self, _: Any, value: float | Decay) -> None:
        if not isinstance(value, Decay) and value not in (0, 1, 2) and not 0 <= value < 1:
            raise ValueError(
                f"DiffusionNFT(decay={value}): the old policy keeps a share of itself. Use a schedule, 0, 1 or 2, a "
                "constant share below 1, or a part such as LinearDecay."
            )

    @property
    def rollout_weights(self) -> Literal["online", "old"]:
        return self.sample_with

    @property
    def needs(self) -> Needs:
        # A rollout without advantage has the label 1/2: it pulls towards the old policy.
        return Needs(parameter_sets={"old"} | self.kl_penalty.parameter_sets, rows="valid")

    def old_decay(self, optimizer_step: int) -> float:
        if isinstance(self.decay, Decay):
            return self.decay.at(optimizer_step)
        return nft_old_decay(optimizer_step, int(self.decay)) if self.decay in (0, 1, 2) else float(self.decay)

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        keys = experience.keys
        sigma, step = self.sigmas.draw(experience, keys, context=context)
        kept = trainable_steps(experience, stochastic_only=False).gather(1, step)

        for rollouts, draws in context.micro_batches(kept):
            noisy = noisy_pairs(experience, rollouts, draws, sigma=sigma, step=step, noise_keys=keys, context=context)
            states, grid = noisy.states, noisy.grid
            velocity, old = noisy.velocity(policy), noisy.velocity_under("old", policy, context)

            weight, advantage = on_grid(states.weight, grid), on_grid(states.advantage, grid)
            if self.spatial == "label":
                advantage, weight = advantage * weight, torch.ones_like(weight)
            label = nft_label(advantage, clip=self.advantage_clip, mode=self.label)
            loss_map = nft_loss_map(
                velocity, old, states.clean_latents, noisy.noise, noisy.sigma, label,
                beta=self.beta, clip=self.advantage_clip, weight=weight,
            )  # fmt: skip
            per_pair = masked_mean(loss_map, on_grid(states.mask.float(), grid) > 0)
            drift = (velocity - old).pow(2).mean(dim=(1, 2, 3))
            metrics = {"loss/nft": per_pair.detach(), "kl/old_v": drift.detach()}

            per_pair, held = self.kl_penalty.add(
                per_pair, velocity, policy, states, context, latents=noisy.state, sigma=noisy.sigma
            )
            yield share_of_mean(per_pair, metrics | held, states.steps, kept=kept, rollouts=rollouts, context=context)
