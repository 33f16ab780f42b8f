"""Proportional step size: a step gets the share of the update that it has of the path."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.steps import at_steps, trained_steps
from rlt2i.functional.time_weights import proportional_dt_weights
from rlt2i.interfaces import CreditContext
from rlt2i.types import Causality


@attrs.frozen(kw_only=True)
class ProportionalDt(Allocation):
    """w_t ~ sigma_t - sigma_{t+1}, mean one over the trained steps (PCPO, arXiv 2509.25774).

    Credit then adds up along the path as an integral does: merging two steps into one keeps their share. Steps that
    cannot be trained keep weight one.
    """

    causality: Causality = attrs.field(default="exogenous", init=False)

    def weight(self, context: CreditContext) -> Tensor:
        steps, trajectory = list(trained_steps(context)), context.trajectory
        trained = torch.zeros_like(trajectory.stochastic)
        trained[steps] = True
        weight = proportional_dt_weights(trajectory.sigmas, mask=trained)
        return at_steps(weight[None, steps], tuple(steps), trajectory.num_steps, elsewhere=1.0)
