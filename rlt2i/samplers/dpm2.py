"""A second-order deterministic sampler, for objectives that need finished images and no likelihood."""

from __future__ import annotations

import attrs
from attrs import validators

from rlt2i.functional.solvers import dpm_solver_2m
from rlt2i.interfaces import Policy, RolloutRequest, Sampler
from rlt2i.samplers.rollout import MOST_STEPS, denoise
from rlt2i.types import Conditioning, Trajectory


@attrs.frozen(kw_only=True)
class DPM2(Sampler):
    """DPM-Solver++(2M) (arXiv 2211.01095) in flow coordinates, DiffusionNFT's sampler. No step has a log-probability.

    First and last step are first order, and so is the second where the schedule starts at pure noise. It costs one
    network call per step, as the ODE does.

    Attributes:
        num_steps: T.
    """

    num_steps: int = attrs.field(default=10, validator=[validators.ge(1), validators.le(MOST_STEPS)])

    def stochastic_steps(self, iteration: int) -> tuple[int, ...]:
        return ()

    def rollout(self, policy: Policy, conditioning: Conditioning, request: RolloutRequest) -> Trajectory:
        return denoise(
            policy,
            conditioning,
            kernel=None,
            stochastic_steps=(),
            num_steps=self.num_steps,
            request=request,
            solver=dpm_solver_2m,
        )
