"""Inverse step size: short steps get as much of the update as long ones."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.steps import over_trained_steps
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
        return over_trained_steps(context, inverse_dt_weights)
