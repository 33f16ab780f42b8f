"""What samplers without noise share."""

from __future__ import annotations

from abc import abstractmethod

import attrs
from attrs import validators

from rlt2i.interfaces import Policy, RolloutRequest, Sampler
from rlt2i.samplers.rollout import MOST_STEPS, Solver, denoise
from rlt2i.types import Conditioning, Trajectory


@attrs.frozen(kw_only=True)
class DeterministicSampler(Sampler):
    """Steps of a solver along the probability-flow ODE. No step has a log-probability.

    Attributes:
        num_steps: T.
    """

    num_steps: int = attrs.field(default=10, validator=[validators.ge(1), validators.le(MOST_STEPS)])

    @property
    @abstractmethod
    def solver(self) -> Solver:
        """Of one step."""

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
            solver=self.solver,
        )
