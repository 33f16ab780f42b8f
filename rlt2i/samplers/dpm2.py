"""A second-order deterministic sampler, for objectives that need finished images and no likelihood."""

from __future__ import annotations

import attrs

from rlt2i.functional.solvers import dpm_solver_2m
from rlt2i.samplers.deterministic import DeterministicSampler
from rlt2i.samplers.rollout import Solver


@attrs.frozen(kw_only=True)
class DPM2(DeterministicSampler):
    """DPM-Solver++(2M) (arXiv 2211.01095) in flow coordinates, DiffusionNFT's sampler. No step has a log-probability.

    First and last step are first order, and so is the second where the schedule starts at pure noise. It costs one
    network call per step, as the ODE does.

    Attributes:
        num_steps: T.
    """

    @property
    def solver(self) -> Solver:
        return dpm_solver_2m
