"""The stochastic sampler: everywhere, or on a window of steps with the ODE elsewhere."""

from __future__ import annotations

import attrs

from rlt2i.samplers.stochastic import StochasticSampler


@attrs.frozen(kw_only=True)
class SDE(StochasticSampler):
    """Noise on the steps [first, last), the ODE on all others.

    The steps that get noise are the ones that can be trained. A few early steps decide the layout of an image, so a
    narrow window concentrates the learning signal, and the ODE tail leaves no residual noise for the reward to trip
    over.

    Attributes:
        num_steps: T.
        kernel: the transition of the stochastic steps.
        window: (first, last), last exclusive; None stands for all steps but the last, which no recipe trains because
            its standard deviation is almost nil.
    """

    window: tuple[int, int] | None = None

    def __attrs_post_init__(self) -> None:
        first, last = self.window or (0, max(1, self.num_steps - 1))
        if not 0 <= first < last <= self.num_steps:
            raise ValueError(
                f"SDE(window={self.window}, num_steps={self.num_steps}): the window must satisfy "
                f"0 <= first < last <= {self.num_steps}, and hold at least one step."
            )

    def stochastic_steps(self, iteration: int) -> tuple[int, ...]:
        first, last = self.window or (0, max(1, self.num_steps - 1))
        return tuple(range(first, last))
