"""Windows of stochastic steps that change from one rollout batch to the next; the ODE everywhere else."""

from __future__ import annotations

import attrs
from attrs import validators

from rlt2i.config import neutral
from rlt2i.functional.windows import PACES, Pace, paced, random_window, sliding_window
from rlt2i.samplers.stochastic import StochasticSampler
from rlt2i.seeds import generator


@attrs.frozen(kw_only=True)
class SlidingSDE(StochasticSampler):
    """MixGRPO's window (arXiv 2507.21802), which moves from noisy to clean steps as training goes on.

    Its code trains on an empty window for a while at the end of each pass; here the window always holds a step.

    Attributes:
        num_steps: T.
        kernel: the transition of the stochastic steps.
        width: how many steps are stochastic at once (fewer where the window meets the end).
        stride: how far the window moves.
        period: rollout batches at each place.
        last: end of the stochastic steps, exclusive; None stands for all but the last step.
        roll_back: start again after the last place; otherwise stay there.
        pace: "constant" stays `period` batches at every place; "linear" and "exponential" stay fewer at cleaner steps,
            as MixGRPO's "decay" and "exp_decay" do.
    """

    width: int = attrs.field(default=4, validator=validators.ge(1))
    stride: int = attrs.field(default=1, validator=validators.ge(1))
    period: int = attrs.field(default=25, validator=validators.ge(1))
    last: int | None = None
    roll_back: bool = True
    pace: Pace = neutral("constant", validator=validators.in_(PACES))

    def __attrs_post_init__(self) -> None:
        last = self._last
        if not 0 < last <= self.num_steps:
            raise ValueError(
                f"SlidingSDE(last={self.last}, num_steps={self.num_steps}): the window moves over the steps before "
                f"last. Use 0 < last <= {self.num_steps}."
            )
        if self.width > last:
            raise ValueError(
                f"SlidingSDE(width={self.width}): only {last} steps may be stochastic. Use width <= {last}, more "
                "steps, or SDE() to have noise on all of them."
            )

    @property
    def _last(self) -> int:
        return max(1, self.num_steps - 1) if self.last is None else self.last

    def stochastic_steps(self, iteration: int) -> tuple[int, ...]:
        return sliding_window(
            iteration,
            num_steps=self.num_steps,
            width=self.width,
            stride=self.stride,
            period=paced(self.period, self.pace, last=self._last),
            last=self._last,
            roll_back=self.roll_back,
        )


@attrs.frozen(kw_only=True)
class RandomWindowSDE(StochasticSampler):
    """Flow-GRPO-Fast's window: `width` steps in a row, at a place that is drawn anew for every rollout batch.

    All processes draw the same place (the authors' draw their own), so they train on equally many steps.

    Attributes:
        num_steps: T.
        kernel: the transition of the stochastic steps.
        width: how many steps are stochastic.
        low, high: range of the window, high exclusive; None stands for half of the steps.
        seed: of the places.
    """

    width: int = attrs.field(default=3, validator=validators.ge(1))
    low: int = attrs.field(default=0, validator=validators.ge(0))
    high: int | None = None
    seed: int = attrs.field(default=0, validator=validators.ge(0))

    def __attrs_post_init__(self) -> None:
        high = self._high
        if not self.low + self.width <= high <= self.num_steps:
            raise ValueError(
                f"RandomWindowSDE(width={self.width}, low={self.low}, high={high}, num_steps={self.num_steps}): the "
                f"window must fit in, so low + width <= high <= {self.num_steps} must hold."
            )

    @property
    def _high(self) -> int:
        return self.num_steps // 2 if self.high is None else self.high

    def stochastic_steps(self, iteration: int) -> tuple[int, ...]:
        draw = generator(self.seed, "window", iteration)
        return random_window(width=self.width, low=self.low, high=self._high, generator=draw)
