"""The transition kernels of the stochastic samplers: thin parts over `rlt2i.functional`."""

from __future__ import annotations

import attrs
from attrs import validators
from torch import Tensor

from rlt2i.functional.gaussian import cps_log_prob_map, log_prob_map
from rlt2i.functional.numerics import Scalar
from rlt2i.functional.transitions import Transition, cps, dance_sde, flow_ddim, flow_sde, precise
from rlt2i.types import TransitionKernel


def _positive(instance: object, attribute: attrs.Attribute, value: float) -> None:
    if not value > 0:
        raise ValueError(
            f"{type(instance).__name__}({attribute.name}={value}): a step without noise has no log-probability to "
            f"optimise. Use {attribute.name} > 0, or the ODE sampler with a forward-process objective."
        )


@attrs.frozen(kw_only=True)
class FlowSDE(TransitionKernel):
    """Flow-GRPO's SDE (arXiv 2505.05470): same marginals as the ODE as the step size vanishes.

    Attributes:
        noise_level: a; the standard deviation of the first step is exactly a.
    """

    noise_level: float = attrs.field(default=0.7, validator=_positive)

    def transition(
        self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, *, sigma_max: Scalar
    ) -> Transition:
        return flow_sde(latents, velocity, sigma, sigma_next, sigma_max=sigma_max, noise_level=self.noise_level)

    def log_prob_map(self, next_latents: Tensor, transition: Transition) -> Tensor:
        return log_prob_map(next_latents, transition.mean, transition.std)


@attrs.frozen(kw_only=True)
class DanceSDE(TransitionKernel):
    """DanceGRPO's SDE with a constant diffusion coefficient (arXiv 2505.07818).

    Attributes:
        eta: standard deviation per square root of unit time.
    """

    eta: float = attrs.field(default=0.3, validator=_positive)

    def transition(
        self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, *, sigma_max: Scalar
    ) -> Transition:
        return dance_sde(latents, velocity, sigma, sigma_next, eta=self.eta)

    def log_prob_map(self, next_latents: Tensor, transition: Transition) -> Tensor:
        return log_prob_map(next_latents, transition.mean, transition.std)


@attrs.frozen(kw_only=True)
class CPS(TransitionKernel):
    """Coefficient-preserving sampling (Flow-CPS): the noise level of x' is exactly sigma_next at every step.

    Its log-probability drops 1/(2 std^2) and the normaliser, as all published clip ranges for it assume.

    Attributes:
        noise_level: a in (0, 1]; 1 resamples the noise completely.
    """

    noise_level: float = attrs.field(default=0.8, validator=[_positive, validators.le(1.0)])

    def transition(
        self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, *, sigma_max: Scalar
    ) -> Transition:
        return cps(latents, velocity, sigma, sigma_next, noise_level=self.noise_level)

    def log_prob_map(self, next_latents: Tensor, transition: Transition) -> Tensor:
        return cps_log_prob_map(next_latents, transition.mean)


@attrs.frozen(kw_only=True)
class DDIM(TransitionKernel):
    """DDIM's family of samplers (arXiv 2010.02502) in flow coordinates; the noise level of x' is exactly sigma_next.

    For an epsilon-prediction model that was made a flow by the change of variables this is DDPO's kernel
    (arXiv 2305.13301), in other coordinates: the density changes by a constant, and no ratio at all.

    Attributes:
        eta: in (0, 1]; 1 is DDPM's ancestral sampling, as DDPO uses it. 0 would be the ODE.
    """

    eta: float = attrs.field(default=1.0, validator=[_positive, validators.le(1.0)])

    def transition(
        self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, *, sigma_max: Scalar
    ) -> Transition:
        return flow_ddim(latents, velocity, sigma, sigma_next, eta=self.eta)

    def log_prob_map(self, next_latents: Tensor, transition: Transition) -> Tensor:
        return log_prob_map(next_latents, transition.mean, transition.std)


@attrs.frozen(kw_only=True)
class Precise(TransitionKernel):
    """Precise's step (arXiv 2605.23522): noise spread evenly over log SNR, without the excess that Euler's step adds.

    Attributes:
        noise_level: a; the authors use 1.5.
    """

    noise_level: float = attrs.field(default=1.5, validator=_positive)

    def transition(
        self, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, *, sigma_max: Scalar
    ) -> Transition:
        return precise(latents, velocity, sigma, sigma_next, noise_level=self.noise_level)

    def log_prob_map(self, next_latents: Tensor, transition: Transition) -> Tensor:
        return log_prob_map(next_latents, transition.mean, transition.std)
