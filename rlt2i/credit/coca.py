"""Contribution by similarity: a step earns what its clean prediction gained on the finished image."""

from __future__ import annotations

import attrs
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import Advantage
from rlt2i.functional.advantages import group_relative_advantage
from rlt2i.functional.step_credit import clean_similarity, coca_advantage, coca_contribution
from rlt2i.interfaces import CreditContext, Needs


@attrs.frozen(kw_only=True)
class CoCA(Advantage):
    """The group-relative advantage, spread over the steps by what was still to be contributed (arXiv 2505.19196).

    A step's contribution is the gain in cosine similarity between the one-step clean prediction and the final latents.
    It costs nothing: the predictions are a by-product of the rollout.

    Attributes:
        alpha: share that all steps get alike; 0 in the authors' code.
        clip: bound on the absolute advantage, before and after it is spread.
        eps: added to both standard deviations.
    """

    alpha: float = attrs.field(default=0.0, validator=[validators.ge(0.0), validators.le(1.0)])
    clip: float = attrs.field(default=5.0, validator=validators.gt(0))
    eps: float = attrs.field(default=1e-4, validator=validators.gt(0))

    @property
    def needs(self) -> Needs:
        return Needs(groups=True, captures={"clean_predictions"})

    def advantage(self, context: CreditContext) -> Tensor:
        rewards, trajectory, size = context.rewards, context.trajectory, context.group_size
        outcome = group_relative_advantage(rewards.final, size, eps=self.eps, valid=rewards.valid)
        similarity = clean_similarity(trajectory.captures["clean_predictions"], trajectory.clean_latents)
        advantage = coca_advantage(
            outcome.clamp(-self.clip, self.clip),
            coca_contribution(similarity),
            size,
            alpha=self.alpha,
            eps=self.eps,
            valid=rewards.valid,
        )
        return advantage.clamp(-self.clip, self.clip).float()[:, :, None, None]
