"""Gradient rectification: every step pulls on the velocity with the same force."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.steps import at_steps, stochastic_steps
from rlt2i.functional.time_weights import rectified_weights
from rlt2i.interfaces import CreditContext, Needs
from rlt2i.types import Causality


@attrs.frozen(kw_only=True)
class GradientRectification(Allocation):
    """w_t ~ std_t / |d mean_t / d v|, mean one over the stochastic steps (Flash-GRPO, arXiv 2605.15980).

    The gradient of a Gaussian step's log-density reaches the velocity with the factor |d mean / d v| / std, which
    differs between steps by the sampler's doing alone; the weight takes it out, for any kernel. Steps without noise
    keep weight one.
    """

    causality: Causality = attrs.field(default="exogenous", init=False)

    @property
    def needs(self) -> Needs:
        return Needs(noise=True)

    def weight(self, context: CreditContext) -> Tensor:
        trajectory = context.trajectory
        why = "without noise no step has a log-density whose gradient could be rectified"
        steps = stochastic_steps(context, of="GradientRectification", because=why)
        sigmas = trajectory.sigmas
        zeros = sigmas.new_zeros(trajectory.num_steps, 1, 1, 1)
        # A step's mean is linear in state and velocity: at x = 0 and v = 1 it is the slope.
        transition = trajectory.transition(zeros, torch.ones_like(zeros), sigmas[:-1], sigmas[1:])
        weight = rectified_weights(
            transition.mean.flatten().abs(), transition.std.flatten(), mask=trajectory.stochastic
        )
        return at_steps(weight[None, list(steps)], steps, trajectory.num_steps, elsewhere=1.0)
