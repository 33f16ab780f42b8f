"""DiffusionOPSD: the policy's own clean predictions, moved along the reward's gradient, are its teachers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import attrs
import torch
from attrs import validators

from rlt2i.functional.ema import nft_old_decay
from rlt2i.functional.matching import nft_label
from rlt2i.functional.reward_targets import gradient_targets, self_distillation_loss_map
from rlt2i.functional.transfer import on_host
from rlt2i.functional.transitions import clean_prediction
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.reduction import masked_mean, on_grid, share, trainable_steps
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class DiffusionOPSD(Objective):
    """clip (r |y+_theta - y+|^2 / g+ + (1 - r) |y-_theta - y-|^2 / g-),  y+- = y_0 +- h grad R / |grad R|.

    On-policy self-distillation (arXiv 2608.24646). At one late state of each rollout the old policy's clean prediction
    y_0 is decoded and judged; the reward's gradient makes a better and a worse target of it, to which the positive and
    the negative branch of DiffusionNFT are fitted. No gradient flows through decoder or sampler into the policy. The
    gradient says where to go, the advantage how much each branch counts; on the first step both agree on the
    direction, whatever the advantage.

    Attributes:
        query_sigma: noise level of the state; the nearest unmasked sampler step is taken.
        radius: length of the step in units of |y_0|.
        beta: mixing strength of the branches.
        advantage_clip: the advantage at which the label r saturates.
        decay: schedule of the old policy: 0 follows at once, 1 is min(.001 s, .5), 2 waits 75 updates.
        sample_with: which weights sample.
    """

    query_sigma: float = attrs.field(default=0.27, validator=[validators.gt(0), validators.le(1)])
    radius: float = attrs.field(default=0.1, validator=validators.gt(0))
    beta: float = attrs.field(default=1.0, validator=validators.gt(0))
    advantage_clip: float = attrs.field(default=5.0, validator=validators.gt(0))
    decay: Literal[0, 1, 2] = attrs.field(default=1, validator=validators.in_((0, 1, 2)))
    sample_with: Literal["online", "old"] = "old"

    @property
    def rollout_weights(self) -> Literal["online", "old"]:
        return self.sample_with

    @property
    def needs(self) -> Needs:
        # A rollout without advantage has the label 1/2: both targets pull.
        return Needs(parameter_sets={"old"}, reward={"gradient"}, rows="valid")

    def old_decay(self, optimizer_step: int) -> float:
        return nft_old_decay(optimizer_step, self.decay)

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        queries = self._queries(experience)
        for rollouts, steps in context.micro_batches(queries):
            states = experience.step_batch(rollouts, steps)
            velocity = policy.velocity(states.latents, states.sigma, states.conditioning)
            with torch.no_grad(), context.weights("old"):
                old = policy.velocity(states.latents, states.sigma, states.conditioning)
            anchor = clean_prediction(states.latents, old, states.sigma)
            judged = context.reward_gradient(anchor, experience.prompts.take(on_host(rollouts).tolist()))
            targets = gradient_targets(anchor, judged.gradient, radius=self.radius)

            grid = (anchor.shape[2], anchor.shape[3])
            label = nft_label(on_grid(states.advantage, grid), clip=self.advantage_clip)
            loss_map = self_distillation_loss_map(
                velocity, old, states.latents, states.sigma, targets, label,
                beta=self.beta, clip=self.advantage_clip, weight=on_grid(states.weight, grid),
            )  # fmt: skip
            per_pair = masked_mean(loss_map, on_grid(states.mask.float(), grid) > 0)
            yield Loss(
                value=(per_pair * share(queries, rollouts, context.num_rollouts)).sum(),
                metrics={
                    "loss/opsd": per_pair.detach(),
                    "kl/old_v": (velocity.detach() - old).pow(2).mean(dim=(1, 2, 3)),
                    "backprop/reward": judged.scores,
                    "backprop/gradient": torch.linalg.vector_norm(judged.gradient, dim=(1, 2, 3)),
                },
                steps=steps,
            )

    def _queries(self, experience: Experience) -> torch.Tensor:
        """[B, T] bool: of the unmasked steps of each rollout the one nearest to `query_sigma`."""
        unmasked = trainable_steps(experience, stochastic_only=False)
        away = (experience.trajectory.sigmas[:-1] - self.query_sigma).abs().expand_as(unmasked)
        nearest = torch.where(unmasked, away, torch.inf).argmin(dim=1, keepdim=True)
        steps = torch.arange(unmasked.shape[1], device=unmasked.device)
        return unmasked & (steps == nearest)
