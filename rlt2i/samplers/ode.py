"""The deterministic sampler: evaluation, and rollouts of forward-process objectives."""

from __future__ import annotations

import attrs

from rlt2i.samplers.deterministic import DeterministicSampler
from rlt2i.samplers.rollout import Solver, euler_step


@attrs.frozen(kw_only=True)
class ODE(DeterministicSampler):
    """Euler steps along the probability-flow ODE. No step has a log-probability."""

    @property
    def solver(self) -> Solver:
        return euler_step
