"""Dense step reward: how much each denoising step improved the clean prediction."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.credit.algebra import StandardisedAdvantage
from rlt2i.functional.advantages import step_gain
from rlt2i.interfaces import CreditContext, Needs


@attrs.frozen(kw_only=True)
class StepGain(StandardisedAdvantage):
    """The gain r_{t+1} - r_t of the reward of the one-step clean prediction, normalised in its group per step.

    Stepwise-Flow-GRPO (arXiv 2603.28718) rewards one-step predictions, DenseGRPO (arXiv 2601.20218) full ODE
    completions; this is the former, which costs T decodes and rewards but no network call.

    Attributes:
        clip: bound on the absolute advantage.
        eps: added to the standard deviation.
    """

    @property
    def needs(self) -> Needs:
        return Needs(groups=True, captures={"clean_predictions"})

    def scored_steps(self, num_steps: int) -> tuple[int, ...]:
        return tuple(range(num_steps))

    def advantage(self, context: CreditContext) -> Tensor:
        gains = step_gain(context.rewards.values, context.group_size, eps=self.eps, valid=context.rewards.valid)
        return self.bounded(gains)[:, :, None, None]
