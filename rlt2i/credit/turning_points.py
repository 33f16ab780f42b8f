"""Turning points: steps that bend a rollout towards its outcome are credited with all that follows from them."""

from __future__ import annotations

import attrs
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import StandardisedAdvantage
from rlt2i.credit.completions import completions
from rlt2i.credit.steps import at_steps
from rlt2i.functional.advantages import group_relative_advantage
from rlt2i.functional.step_credit import balance_turning_points, turning_point_reward, turning_points
from rlt2i.interfaces import CreditContext, Needs


@attrs.frozen(kw_only=True)
class TurningPoints(StandardisedAdvantage):
    """Step gains of ODE completions, replaced by R_final - R_{t-1} at turning points (TP-GRPO, arXiv 2602.06422).

    A step turns when the one before it worked against the outcome of its rollout and it works towards it; the first
    step turns when its gain and what is still to come have one sign. The published run is the default. Its budget is
    that of `CompletionGain`.

    Attributes:
        eta: strength of the bonus.
        balance: keep as many turning points of rising as of falling rollouts, those with the largest change first;
            counted over the whole batch of all processes.
        clip: bound on the absolute advantage.
        eps: added to the standard deviation.
    """

    eta: float = attrs.field(default=1.0, validator=validators.gt(0))
    balance: bool = True

    @property
    def needs(self) -> Needs:
        return Needs(groups=True, noise=True)

    def advantage(self, context: CreditContext) -> Tensor:
        values, valid, steps = completions(context, of="TurningPoints")
        ode, after, final = values[:, 0], values[:, 1:], values[:, -1]
        points = turning_points(ode, after, final) & valid[:, None]
        if self.balance:
            change = (final - ode)[:, None].expand_as(after).contiguous()
            points = context.local(balance_turning_points(context.gather(points), context.gather(change)))
        reward = turning_point_reward(ode, after, final, points, eta=self.eta).reward
        size = values.abs().amax(dim=1, keepdim=True)
        advantage = group_relative_advantage(reward, context.group_size, eps=self.eps, valid=valid, size=size)
        return at_steps(self.bounded(advantage), steps, context.trajectory.num_steps, elsewhere=0.0)
