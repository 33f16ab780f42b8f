"""Dense step reward: how much each noisy step improved the image that the ODE would make of it."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.credit.algebra import StandardisedAdvantage
from rlt2i.credit.completions import completions
from rlt2i.credit.steps import at_steps
from rlt2i.functional.advantages import step_gain
from rlt2i.interfaces import CreditContext, Needs


@attrs.frozen(kw_only=True)
class CompletionGain(StandardisedAdvantage):
    """R(ODE(x_{t+1})) - R(ODE(x_t)), normalised in its group per step (DenseGRPO, arXiv 2601.20218).

    Budget per rollout: for every stochastic step s, T - s network calls, one decoding and one reward. Ten steps with
    noise on all but the last cost 54 calls on top of the rollout's own 10; a window over the first three costs 27, and
    18 when the group shares its initial noise. `StepGain` is the same idea with one-step predictions, without any
    network call.

    Attributes:
        clip: bound on the absolute advantage.
        eps: added to the standard deviation.
    """

    @property
    def needs(self) -> Needs:
        return Needs(groups=True, noise=True)

    def advantage(self, context: CreditContext) -> Tensor:
        values, valid, steps = completions(context, of="CompletionGain")
        gains = step_gain(values, context.group_size, eps=self.eps, valid=valid)
        return at_steps(self.bounded(gains), steps, context.trajectory.num_steps, elsewhere=0.0)
