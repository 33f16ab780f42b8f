"""Noise-aware weights: steps that explore more get more credit."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.steps import at_steps, stochastic_steps
from rlt2i.functional.time_weights import noise_aware_weights
from rlt2i.interfaces import CreditContext, Needs
from rlt2i.types import Causality


@attrs.frozen(kw_only=True)
class NoiseAware(Allocation):
    """w_t = std_t / mean std over the stochastic steps, with the full standard deviation (TempFlow-GRPO, 2508.04324).

    The gradient of a Gaussian log-probability goes as 1 / std, so without it the last steps, which change the least,
    are updated the most. Steps without noise keep weight one.
    """

    causality: Causality = attrs.field(default="exogenous", init=False)

    @property
    def needs(self) -> Needs:
        return Needs(noise=True)

    def weight(self, context: CreditContext) -> Tensor:
        trajectory = context.trajectory
        steps = stochastic_steps(context, of="NoiseAware", because="without noise there is no noise to weigh steps by")
        sigmas = trajectory.sigmas
        zeros = sigmas.new_zeros(trajectory.num_steps, 1, 1, 1)  # the std of a kernel depends on the schedule alone
        transition = trajectory.transition(zeros, zeros, sigmas[:-1], sigmas[1:])
        weight = noise_aware_weights(transition.std.flatten(), mask=trajectory.stochastic)
        return at_steps(weight[None, list(steps)], steps, trajectory.num_steps, elsewhere=1.0)
