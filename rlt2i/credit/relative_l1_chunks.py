"""Chunks of steps that change the image alike share their credit."""

from __future__ import annotations

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.steps import at_steps, trained_steps
from rlt2i.functional.time_weights import chunk_by_relative_l1, relative_l1
from rlt2i.interfaces import CreditContext
from rlt2i.types import Causality


@attrs.frozen(kw_only=True)
class RelativeL1Chunks(Allocation):
    """Every chunk of steps weighs the same, whatever its length: w_t = T / (J |chunk of t|) (GCPO, arXiv 2510.21583).

    Chunks are runs of steps with similar relative change |x_t - x_{t+1}| / |x_t|, cut anew for every batch. GCPO gives
    a chunk one ratio, the geometric mean of its steps' ratios, and every chunk one term of the loss; this weight has
    the same gradient on policy. What it does not do is clip a chunk as one. Steps that cannot be trained keep weight
    one.

    Attributes:
        num_chunks: J, at most the number of trained steps; 1 and that number give uniform credit.
    """

    # The curve is a mean over the batch, but the states it is made of end at the finished image.
    causality: Causality = attrs.field(default="outcome", init=False)

    num_chunks: int = attrs.field(default=2, validator=validators.ge(1))

    def weight(self, context: CreditContext) -> Tensor:
        steps, trajectory = trained_steps(context), context.trajectory
        if self.num_chunks > len(steps):
            raise ValueError(
                f"RelativeL1Chunks(num_chunks={self.num_chunks}): {len(steps)} steps are trained, and every chunk "
                f"needs one. Use num_chunks <= {len(steps)}, or widen the sampler's window."
            )
        change = context.gather(relative_l1(trajectory.latents)[:, list(steps)].contiguous())
        lengths = torch.tensor(chunk_by_relative_l1(change, self.num_chunks))
        share = (len(steps) / (self.num_chunks * lengths)).repeat_interleave(lengths)
        return at_steps(share.to(change)[None], steps, trajectory.num_steps, elsewhere=1.0)
