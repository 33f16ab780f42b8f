"""Sliding window: train a few steps at a time, from noisy to clean."""

from __future__ import annotations

import attrs
from attrs import validators
from torch import Tensor

from rlt2i.config import neutral
from rlt2i.credit.algebra import Mask
from rlt2i.credit.steps import step_mask, trained_steps
from rlt2i.functional.windows import PACES, Pace, paced, sliding_window
from rlt2i.interfaces import CreditContext


@attrs.frozen(kw_only=True)
class SlidingWindow(Mask):
    """`width` consecutive steps that move on by `stride` every `period` rollout batches (MixGRPO, arXiv 2507.21802).

    It slides over the steps that the sampler makes stochastic (all steps of a deterministic one) and starts again after
    the last place, so no window is ever empty. Only the loss is windowed: to save network calls and noise as MixGRPO
    does, the sampler's own window must move too.

    Attributes:
        width: steps at once; fewer at the end of a pass.
        period: rollout batches at each place.
        stride: how far the window moves.
        pace: "constant" stays `period` batches at every place; "linear" and "exponential" stay fewer at cleaner steps,
            down to a quarter of `period`, or by e^-.1 a step from the 14th on.
    """

    width: int = attrs.field(default=4, validator=validators.ge(1))
    period: int = attrs.field(default=25, validator=validators.ge(1))
    stride: int = attrs.field(default=1, validator=validators.ge(1))
    pace: Pace = neutral("constant", validator=validators.in_(PACES))

    def mask(self, context: CreditContext) -> Tensor:
        steps = trained_steps(context)
        places = sliding_window(
            context.iteration,
            num_steps=len(steps),
            width=self.width,
            period=paced(self.period, self.pace, last=len(steps)),
            stride=self.stride,
            last=len(steps),
        )
        return step_mask(tuple(steps[place] for place in places), context)
