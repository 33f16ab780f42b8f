"""DGPO: direct preference of a group's good images over its bad ones, without likelihoods or pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.config import neutral
from rlt2i.functional.group_matching import dgpo_clipped, dgpo_group_weight, dgpo_loss_map
from rlt2i.functional.transfer import chosen, on_host, to_device
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.decay import Decay, PiecewiseLinearDecay
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.forward import NoisyPairs, noisy_pairs, whole_groups
from rlt2i.objectives.penalty import VelocityPenalty
from rlt2i.objectives.reduction import on_grid, share_of_mean, trainable_steps, weight_and_mask
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class DGPO(Objective):
    """mean W_g A w m + KL penalty, W_g = sigmoid(beta / G sum_i A_i mean_p w_ip (m - m_anchor)_ip).

    Direct group preference optimisation (arXiv 2510.08425). m is the flow-matching error of a finished image; noise and
    noise level are shared by a group, so that errors differ by the images and not by the draw. W_g falls as the group's
    preferences are learned. Weight maps sit inside the logit and on the error alike.

    Attributes:
        beta: strength inside W_g, for errors that are means over latent dimensions.
        anchor: what W_g compares with: the starting weights, or the moving reference.
        clip_range: a sample stops learning once exp(m_moving - m) has left 1 +- eps in the direction of its advantage;
            the moving reference follows with `decay`, once per rollout batch. Null never clips.
        kl_penalty: towards the reference policy.
        sigmas: the noise levels trained at, drawn once per group.
        sample_with: "old" samples with the moving reference, as the authors do after some hundred updates.
        decay: how much of itself the moving reference keeps; published min(.3, .001 s).
    """

    beta: float = attrs.field(default=100.0, validator=validators.gt(0))
    anchor: Literal["reference", "old"] = attrs.field(
        default="reference", validator=validators.in_(("reference", "old"))
    )
    clip_range: float | None = attrs.field(
        default=1e-2,
        validator=validators.optional(validators.gt(0.0)),  # type: ignore[arg-type]
    )
    kl_penalty: VelocityPenalty = attrs.field(factory=VelocityPenalty)
    sigmas: SigmaDraws = attrs.field(factory=SigmaDraws)
    decay: Decay = neutral(PiecewiseLinearDecay(decay=0.3, rate=0.001))
    sample_with: Literal["online", "old"] = attrs.field(default="online", validator=validators.in_(("online", "old")))

    @property
    def rollout_weights(self) -> Literal["online", "old"]:
        return self.sample_with

    @property
    def needs(self) -> Needs:
        reference: set[str] = {"reference"} if self.anchor == "reference" or self.kl_penalty.weight > 0 else set()
        moving: set[str] = {"old"} if "old" in (self.anchor, self.sample_with) or self.clip_range is not None else set()
        pulling = self.kl_penalty.weight > 0
        return Needs(parameter_sets=reference | moving, groups=True, rows="valid" if pulling else "groups")

    def old_decay(self, optimizer_step: int) -> float:
        return self.decay.at(optimizer_step)

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        groups = experience.groups
        sigma, step = self.sigmas.draw(experience, groups, context=context)
        kept = trainable_steps(experience, stochastic_only=False).gather(1, step)
        group_size = context.num_rollouts / max(1, context.num_groups)

        for rollouts, draws in whole_groups(experience, kept, context, who="DGPO"):
            noisy = noisy_pairs(experience, rollouts, draws, sigma=sigma, step=step, noise_keys=groups, context=context)
            states, members = noisy.states, chosen(groups, rollouts)
            velocity = noisy.velocity(policy)
            error = noisy.error(velocity)
            old = {name: noisy.velocity_under(name, policy, context) for name in self._compared}

            weight, advantage = weight_and_mask(states, noisy.grid), on_grid(states.advantage, noisy.grid)
            # W_g averages over the group; a rollout without advantage adds 0, and was not even given to us.
            present = _count(members) / group_size
            group_weight = dgpo_group_weight(
                error, noisy.error(old[self.anchor]), present, members, beta=self.beta, weight=weight * advantage
            )
            learning, metrics = self._clip(noisy, error, old, advantage.mean(dim=(1, 2)))
            per_pair = dgpo_loss_map(learning, advantage, group_weight, weight=weight).mean(dim=(1, 2))
            metrics |= {"loss/dgpo": per_pair.detach(), "dgpo/group_weight": group_weight}

            if self.kl_penalty.weight > 0:
                distance = self.kl_penalty.distance(velocity, old["reference"], states, noisy.sigma)
                per_pair, held = self.kl_penalty.plus(per_pair, distance)
                metrics |= held

            yield share_of_mean(per_pair, metrics, states.steps, kept=kept, rollouts=rollouts, context=context)

    @property
    def _compared(self) -> tuple[str, ...]:
        """The parameter sets whose velocities a loss looks at."""
        clipping = {"old"} if self.clip_range is not None else set()
        return tuple(sorted({self.anchor} | clipping | self.kl_penalty.parameter_sets))

    def _clip(
        self, noisy: NoisyPairs, error: Tensor, old: dict[str, Tensor], advantage: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The error, without gradient where a sample has learned enough, and how many on each side have."""
        if self.clip_range is None:
            return error, {}
        clipped = dgpo_clipped(error, noisy.error(old["old"]), advantage, clip_range=self.clip_range)
        praised = advantage > 0
        metrics = {"clip/high": (clipped & praised).float(), "clip/low": (clipped & ~praised).float()}
        return torch.where(clipped[:, None, None], error.detach(), error), metrics


def _count(members: Tensor) -> Tensor:
    """[N] how many of the N have the same group."""
    _, index, counts = on_host(members).unique(return_inverse=True, return_counts=True)
    return to_device(counts[index].float(), members.device)
