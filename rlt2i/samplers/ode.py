"""The deterministic sampler: evaluation, and rollouts of forward-process objectives."""

from __future__ import annotations

import attrs
from attrs import validators

from rlt2i.interfaces import Policy, RolloutRequest, Sampler
from rlt2i.samplers.rollout import MOST_STEPS, denoise
from rlt2i.types import Conditioning, Trajectory


@attrs.frozen(kw_only=True)
class ODE(Sampler):
    """Euler steps along the probability-flow ODE. No step has a log-probability."""

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
        )
