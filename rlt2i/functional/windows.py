"""Which steps of a rollout are stochastic and trained; a window is a tuple of step indices."""

import math
from collections.abc import Callable
from functools import partial
from typing import Final, Literal

import torch

Pace = Literal["constant", "linear", "exponential"]
PACES: Final[tuple[Pace, ...]] = ("constant", "linear", "exponential")
"""How the iterations that a sliding window stays at a place fall towards cleaner steps."""


def sliding_window(
    update: int,
    *,
    num_steps: int,
    width: int,
    period: int | Callable[[int], int],
    stride: int = 1,
    last: int | None = None,
    roll_back: bool = True,
) -> tuple[int, ...]:
    """MixGRPO's progressive window (arXiv 2507.21802), from noisy to clean, `period` updates at each place.

        window = [l, min(l + width, last)),   l = 0, stride, 2 stride, ... < last

    MixGRPO's code moves on only when l *exceeds* its end, so it trains on an empty window for a whole period
    at the end of each pass; and its end is num_steps - 2. Here no window is empty and the default end is
    num_steps - 1: the very last step, whose noise would be visible in the image, is never stochastic.

    Args:
        update: index of the optimizer iteration, from 0.
        num_steps: T.
        width: how many steps are stochastic at once.
        period: iterations per place, or a function from the place l to it (see `paced`).
        stride: how far the window moves; MixGRPO 1, verl-omni `width`.
        last: end of the stochastic steps (exclusive); None stands for num_steps - 1.
        roll_back: start again after the last place; otherwise stay there.

    Returns:
        At most `width` step indices, at least one.

    Raises:
        ValueError: where no step can be stochastic, or width, stride or period are below 1.
    """
    last = num_steps - 1 if last is None else last
    if not 0 < last <= num_steps:
        raise ValueError(f"last={last} of num_steps={num_steps}: no step can be stochastic. Use 0 < last <= num_steps.")
    if min(width, stride) < 1:
        raise ValueError(f"width={width}, stride={stride}: both must be at least 1.")
    starts = range(0, last, stride)
    lengths = [period(start) if callable(period) else period for start in starts]
    if min(lengths) < 1:
        raise ValueError(f"period gives {lengths} iterations: every place needs at least 1.")
    position = update % sum(lengths) if roll_back else min(update, sum(lengths) - 1)
    for start, length in zip(starts, lengths, strict=True):
        if position < length:
            return tuple(range(start, min(start + width, last)))
        position -= length
    raise AssertionError("position lies within the sum of the lengths")


def linear_period(start: int, *, first: int, least: int, last: int) -> int:
    """MixGRPO's "decay", fewer iterations at cleaner steps: max(least, floor(first (1 - u) + least u)), u = l / last.

    Args:
        start: l, where the window begins.
        first: iterations at l = 0.
        least: fewest iterations; MixGRPO max(1, first // 4).
        last: end of the stochastic steps.
    """
    progress = start / last
    return max(least, int(first * (1 - progress) + least * progress))


def exponential_period(start: int, *, first: int, threshold: int, rate: float) -> int:
    """MixGRPO's "exp_decay": ceil(first exp(-rate max(0, l - threshold))).

    Args:
        start: l, where the window begins.
        first: iterations up to the threshold.
        threshold: place from which on the number falls; MixGRPO 13.
        rate: MixGRPO .1.
    """
    return math.ceil(first * math.exp(-rate * max(0, start - threshold)))


def paced(period: int, pace: Pace, *, last: int) -> int | Callable[[int], int]:
    """The periods of a sliding window as MixGRPO's code has them, under the names of their shapes.

    Args:
        period: iterations at the first place.
        pace: "constant" ("progressive" there); "linear" ("decay"), down to a quarter; "exponential" ("exp_decay"), by
            e^-.1 a step from the 14th on.
        last: end of the stochastic steps.
    """
    if pace == "linear":
        return partial(linear_period, first=period, least=max(1, period // 4), last=last)
    if pace == "exponential":
        return partial(exponential_period, first=period, threshold=13, rate=0.1)
    return period


def random_window(*, width: int, low: int, high: int, generator: torch.Generator) -> tuple[int, ...]:
    """Flow-GRPO-Fast's window: `width` consecutive steps, starting uniformly at low .. high - width (inclusive).

    Args:
        width: number of stochastic steps.
        low: first step that may be stochastic.
        high: end of the range (exclusive); published 0 and T/2.
        generator: shared by all ranks, so that they agree on the number of steps.

    Returns:
        `width` step indices.

    Raises:
        ValueError: for a width that does not fit.
    """
    if not 0 < width <= high - low:
        raise ValueError(f"width={width} does not fit between low={low} and high={high}.")
    start = int(torch.randint(low, high - width + 1, (), generator=generator, device=generator.device))
    return tuple(range(start, start + width))


def random_subset(*, count: int, steps: int, generator: torch.Generator) -> tuple[int, ...]:
    """`count` of the first `steps` steps (DanceGRPO's fraction of timesteps, Flow-Factory's stochastic steps).

    Args:
        count: how many.
        steps: size of the pool; num_steps - 1 leaves out the last step.
        generator: shared by all ranks.

    Returns:
        Ascending step indices; their order does not matter to a sum.

    Raises:
        ValueError: unless 1 <= count <= steps.
    """
    if not 0 < count <= steps:
        raise ValueError(f"count={count} of {steps} steps: choose between 1 and {steps} of them.")
    order = torch.randperm(steps, generator=generator, device=generator.device)
    return tuple(sorted(order[:count].tolist()))
