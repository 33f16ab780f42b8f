"""Random window: each rollout batch trains a few consecutive steps, drawn anew."""

from __future__ import annotations

import attrs
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import Mask
from rlt2i.credit.steps import step_mask, trained_steps
from rlt2i.functional.windows import random_window
from rlt2i.interfaces import CreditContext


@attrs.frozen(kw_only=True)
class RandomWindow(Mask):
    """`width` consecutive steps, their start uniform over the sampler's stochastic steps (Flow-GRPO-Fast).

    Processes agree on the window, so that their steps cost the same.

    Attributes:
        width: steps per batch; at most as many as the sampler makes stochastic.
    """

    width: int = attrs.field(default=2, validator=validators.ge(1))

    def mask(self, context: CreditContext) -> Tensor:
        steps = trained_steps(context)
        if self.width > len(steps):
            raise ValueError(
                f"RandomWindow(width={self.width}): only {len(steps)} steps can be trained. Use width <= {len(steps)}, "
                "or widen the sampler's window."
            )
        drawn = random_window(width=self.width, low=0, high=len(steps), generator=context.generator)
        return step_mask(tuple(steps[place] for place in drawn), context)
