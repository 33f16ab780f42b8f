"""Reward saliency: credit goes to the places that a differentiable reward depends on."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.spatial import relative_weight, to_grid
from rlt2i.functional.maps import blur2d
from rlt2i.functional.reward_backprop import Saliency, gradient_saliency
from rlt2i.interfaces import CreditContext, Needs
from rlt2i.types import Causality


@attrs.frozen(kw_only=True)
class RewardSaliency(Allocation):
    """sum_c |d R / d z_c| of the latents z that the reward judged, after decoding, by place.

    The reward model itself says what it looked at; neither attention nor regions are needed, only a reward with a
    gradient. It is a first-order answer: a place whose small changes do not matter gets nothing, also where a large one
    would, such as the inside of a region that has all the colour it can have. Rollouts without a valid reward and
    images without any gradient get the uniform map.

    Attributes:
        at: "final" judges the finished latents, one map for all steps (causality: outcome). "predictions" judges the
            one-step clean prediction of every step: a function of the state x_t, so one map per step (causality:
            state), at T times the price.
        form: "gradient", or "gradient_times_input": |sum_c z_c d R / d z_c|.
        blur: standard deviation of a Gaussian blur, in image tokens.
        mix: share of the saliency map against the uniform map.
        floor: weight of a place without saliency, relative to the strongest.
    """

    at: Literal["final", "predictions"] = attrs.field(
        default="final", validator=validators.in_(("final", "predictions"))
    )
    form: Saliency = attrs.field(default="gradient", validator=validators.in_(("gradient", "gradient_times_input")))
    blur: float = attrs.field(default=1.0, validator=validators.ge(0))
    mix: float = attrs.field(default=0.5, validator=[validators.ge(0.0), validators.le(1.0)])
    floor: float = attrs.field(default=0.02, validator=[validators.gt(0.0), validators.le(1.0)])

    @property
    def causality(self) -> Causality:
        return "outcome" if self.at == "final" else "state"

    @property
    def needs(self) -> Needs:
        return Needs(reward={"gradient"}, captures=set() if self.at == "final" else {"clean_predictions"})

    def weight(self, context: CreditContext) -> Tensor:
        trajectory = context.trajectory
        judged = trajectory.clean_latents[:, None]
        if self.at == "predictions":
            judged = trajectory.captures["clean_predictions"]
        rows = context.rewards.valid.nonzero()[:, 0]
        num_rollouts, num_steps, _, height, width = judged.shape
        saliency = judged.new_zeros(num_rollouts, num_steps, height, width, dtype=torch.float32)
        for step in range(num_steps if len(rows) else 0):
            latents = judged[rows, step]
            gradient = context.reward_gradient(latents, rows).gradient
            saliency[rows, step] = gradient_saliency(gradient, latents, form=self.form).float()
        on_tokens = to_grid(saliency.flatten(0, 1), context.token_grid).unflatten(0, (num_rollouts, num_steps))
        return relative_weight(blur2d(on_tokens, self.blur), mix=self.mix, floor=self.floor)
