"""Proportional step size: a step gets the share of the update that it has of the path."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.steps import over_trained_steps
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
        return over_trained_steps(context, proportional_dt_weights)
