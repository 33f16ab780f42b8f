"""What samplers share that are stochastic at some steps and follow the ODE at all others."""

from __future__ import annotations

import attrs
from attrs import validators

from rlt2i.interfaces import Policy, RolloutRequest, Sampler
from rlt2i.samplers.kernels import FlowSDE
from rlt2i.samplers.rollout import MOST_STEPS, denoise
from rlt2i.types import Conditioning, Trajectory, TransitionKernel


@attrs.frozen(kw_only=True)
class StochasticSampler(Sampler):
    """Noise on the stochastic steps, Euler's ODE step on all others; which these are is for the subclass to say.

    Attributes:
        num_steps: T.
        kernel: the transition of the stochastic steps.
    """

    num_steps: int = attrs.field(default=10, validator=[validators.ge(1), validators.le(MOST_STEPS)])
    kernel: TransitionKernel = attrs.field(factory=FlowSDE)

    def rollout(self, policy: Policy, conditioning: Conditioning, request: RolloutRequest) -> Trajectory:
        return denoise(
            policy,
            conditioning,
            kernel=self.kernel,
            stochastic_steps=self.stochastic_steps(request.iteration),
            num_steps=self.num_steps,
            request=request,
        )
