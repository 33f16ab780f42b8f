"""Inverse step size: short steps get as much of the update as long ones."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.steps import at_steps, trained_steps
from rlt2i.functional.time_weights import inverse_dt_weights
from rlt2i.interfaces import CreditContext
from rlt2i.types import Causality


@attrs.frozen(kw_only=True)
class InverseDt(Allocation):
    """w_t ~ 1 / (sigma_t - sigma_{t+1}), mean one over the trained steps (GRPO-Guard, arXiv 2510.22319).

    Guard's reweighting is meant for its normalised ratio, whose gradient shrinks with the step. Under a plain ratio it
    adds to an imbalance that is there already. Steps that cannot be trained keep weight one.
    """

    causality: Causality = attrs.field(default="exogenous", init=False)

    def weight(self, context: CreditContext) -> Tensor:
        steps, trajectory = list(trained_steps(context)), context.trajectory
        trained = torch.zeros_like(trajectory.stochastic)
        trained[steps] = True
        weight = inverse_dt_weights(trajectory.sigmas, mask=trained)
        return at_steps(weight[None, steps], tuple(steps), trajectory.num_steps, elsewhere=1.0)
