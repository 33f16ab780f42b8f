"""Residual contrast: credit goes where a good and a bad image of the same prompt were hard in different ways."""

from __future__ import annotations

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.spatial import relative_weight, to_grid
from rlt2i.functional.groups import masked_mean, tied
from rlt2i.functional.maps import residual_contrast
from rlt2i.interfaces import CreditContext, Needs
from rlt2i.types import Causality

_unit = [validators.ge(0.0), validators.le(1.0)]


@attrs.frozen(kw_only=True)
class ResidualContrast(Allocation):
    """ToPO's |e+ - e-| on the rollouts themselves: e_t is the error of the clean prediction at step t, by place.

    Every rollout is contrasted with the other end of its group: with the worst one where its reward is above the
    group's mean, else with the best one. Groups whose rewards are all equal, and rollouts without a valid reward, get
    the uniform map. The predictions are a by-product of the rollout, so the maps cost nothing; with a shared initial
    noise the two errors differ by what the policy did.

    Attributes:
        mix: share of the contrast map against the uniform map.
        floor: weight of a place without contrast, relative to the strongest place.
    """

    causality: Causality = attrs.field(default="outcome", init=False)

    mix: float = attrs.field(default=0.5, validator=_unit)
    floor: float = attrs.field(default=0.02, validator=[validators.gt(0.0), validators.le(1.0)])

    @property
    def needs(self) -> Needs:
        return Needs(groups=True, captures={"clean_predictions"})

    def weight(self, context: CreditContext) -> Tensor:
        trajectory = context.trajectory
        predictions = trajectory.captures["clean_predictions"].float()
        error = (predictions - trajectory.clean_latents.float()[:, None]).pow(2).mean(dim=2)
        on_tokens = to_grid(error.flatten(0, 1), context.token_grid).unflatten(0, error.shape[:2])
        partner, tells_apart = _other_end(context)
        weight = relative_weight(residual_contrast(on_tokens, on_tokens[partner]), mix=self.mix, floor=self.floor)
        return torch.where(tells_apart[:, None, None, None], weight, 1)


def _other_end(context: CreditContext) -> tuple[Tensor, Tensor]:
    """[B] long, the worst rollout of the group for those above its mean, the best for the others; [B] bool, if any."""
    size, valid = context.group_size, context.rewards.valid.view(-1, context.group_size)
    rewards = context.rewards.final.view(-1, size)
    first = torch.arange(0, rewards.numel(), size, device=rewards.device)[:, None]
    best = torch.where(valid, rewards, -torch.inf).argmax(dim=1, keepdim=True) + first
    worst = torch.where(valid, rewards, torch.inf).argmin(dim=1, keepdim=True) + first
    partner = torch.where(rewards > masked_mean(rewards, valid, 1), worst, best)
    return partner.flatten(), (valid & ~tied(rewards, valid)).flatten()
