"""How much of itself an averaged policy keeps at each update: schedules by the number of optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import attrs
from attrs import validators

from rlt2i.functional.ema import (
    constant_decay,
    cosine_decay,
    linear_decay,
    piecewise_linear_decay,
    power_decay,
    warmup_cosine_decay,
)

SHARE: Final = (validators.ge(0.0), validators.le(1.0))


class Decay(ABC):
    """A schedule d(s) in [0, 1]: the average becomes d e + (1 - d) p."""

    @abstractmethod
    def at(self, optimizer_step: int) -> float:
        """d after so many steps of the optimizer."""


@attrs.frozen(kw_only=True)
class ConstantDecay(Decay):
    """The same at every step.

    Attributes:
        decay: d.
    """

    decay: float = attrs.field(default=0.999, validator=SHARE)

    def at(self, optimizer_step: int) -> float:
        return constant_decay(optimizer_step, decay=self.decay)


@attrs.frozen(kw_only=True)
class PowerDecay(Decay):
    """min(decay, (1 + s) / (warmup + s)), Flow-GRPO's warm-up with decay .9 and warmup 10.

    Attributes:
        decay: where it ends.
        warmup: larger is slower; 0 is constant.
    """

    decay: float = attrs.field(default=0.999, validator=SHARE)
    warmup: int = attrs.field(default=10, validator=validators.ge(0))

    def at(self, optimizer_step: int) -> float:
        return power_decay(optimizer_step, decay=self.decay, warmup=self.warmup)


@attrs.frozen(kw_only=True)
class LinearDecay(Decay):
    """Linear from `initial` to `decay` over `warmup` steps, then constant.

    Attributes:
        decay: where it ends.
        initial: where it begins.
        warmup: steps between them.
    """

    decay: float = attrs.field(default=0.999, validator=SHARE)
    initial: float = attrs.field(default=0.0, validator=SHARE)
    warmup: int = attrs.field(default=100, validator=validators.ge(0))

    def at(self, optimizer_step: int) -> float:
        return linear_decay(optimizer_step, decay=self.decay, initial=self.initial, warmup=self.warmup)


@attrs.frozen(kw_only=True)
class PiecewiseLinearDecay(Decay):
    """0 for `flat` steps, then growing by `rate` a step up to `decay`; DGPO's and AWM's have .3 and .001.

    Attributes:
        decay: where it ends.
        flat: steps at 0.
        rate: growth per step.
    """

    decay: float = attrs.field(default=0.3, validator=SHARE)
    flat: int = attrs.field(default=0, validator=validators.ge(0))
    rate: float = attrs.field(default=0.001, validator=validators.gt(0))

    def at(self, optimizer_step: int) -> float:
        return piecewise_linear_decay(optimizer_step, decay=self.decay, flat=self.flat, rate=self.rate)


@attrs.frozen(kw_only=True)
class CosineDecay(Decay):
    """Half a cosine from `initial` to `decay` over `total` steps, then constant.

    Attributes:
        decay: where it ends.
        initial: where it begins.
        total: steps between them.
    """

    decay: float = attrs.field(default=0.999, validator=SHARE)
    initial: float = attrs.field(default=0.9, validator=SHARE)
    total: int = attrs.field(default=1000, validator=validators.ge(1))

    def at(self, optimizer_step: int) -> float:
        return cosine_decay(optimizer_step, decay=self.decay, initial=self.initial, total=self.total)


@attrs.frozen(kw_only=True)
class WarmupCosineDecay(Decay):
    """Linear from 0 to `initial` over `warmup` steps, then half a cosine to `decay` at step `total`.

    Attributes:
        decay: where it ends.
        initial: where the cosine begins.
        warmup: steps until then, fewer than `total`.
        total: when it ends.
    """

    decay: float = attrs.field(default=0.999, validator=SHARE)
    initial: float = attrs.field(default=0.9, validator=SHARE)
    warmup: int = attrs.field(default=100, validator=validators.ge(1))
    total: int = attrs.field(default=1000, validator=validators.ge(2))

    def __attrs_post_init__(self) -> None:
        self.at(0)  # says what is wrong with warmup and total

    def at(self, optimizer_step: int) -> float:
        return warmup_cosine_decay(
            optimizer_step, decay=self.decay, initial=self.initial, warmup=self.warmup, total=self.total
        )
