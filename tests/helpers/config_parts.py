"""Parts with every kind of field, for the tests of configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs.validators import ge, gt, in_, le, optional


class Shape(ABC):
    @abstractmethod
    def area(self) -> float: ...


class Paint(ABC):
    @abstractmethod
    def name(self) -> str: ...


@attrs.frozen(kw_only=True)
class Circle(Shape):
    radius: float = attrs.field(default=1.0, validator=gt(0))

    def area(self) -> float:
        return 3.0 * self.radius**2


@attrs.frozen(kw_only=True)
class Square(Shape):
    side: float = attrs.field()
    tilt: int = attrs.field(default=0, validator=[ge(-90), le(90)])
    corner: Literal["sharp", "round"] = "sharp"

    @side.validator
    def _check_side(self, _: Any, value: float) -> None:
        if value <= 0:
            raise ValueError(f"Square(side={value}): a square needs an extent. Use side > 0.")

    def area(self) -> float:
        return self.side**2


@attrs.frozen(kw_only=True)
class Red(Paint):
    def name(self) -> str:
        return "red"


class Unfinished(Shape):
    """Concrete enough to instantiate, but no attrs class."""

    def area(self) -> float:
        return 0.0


@attrs.frozen(kw_only=True)
class Margins:
    left: int = 1
    right: int = 2


@attrs.frozen(kw_only=True)
class Drawing:
    title: str
    shape: Shape
    count: int = attrs.field(default=1, validator=ge(1))
    mix: float = attrs.field(default=0.5, validator=[ge(0.0), le(1.0)])
    scale: float | None = attrs.field(default=None, validator=optional(gt(0)))
    blocks: int | Literal["auto"] = "auto"
    filled: bool = False
    style: str = attrs.field(default="plain", validator=in_(("plain", "bold")))
    size: tuple[int, int] = (4, 3)
    levels: tuple[float, ...] = ()
    tags: frozenset[str] = frozenset()
    more: tuple[Shape, ...] = ()
    named: Mapping[str, Shape] = attrs.field(factory=dict)
    weights: Mapping[str, float] = attrs.field(factory=dict)
    paint: Paint | None = None
    margins: Margins = attrs.field(factory=Margins)
    path: Path | None = None
    cache: list[int] = attrs.field(factory=list, init=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if self.filled and self.paint is None:
            raise ValueError("Drawing(filled=True, paint=None): say which paint.")


PARTS = {
    "Shape": {
        "Circle": "tests.helpers.config_parts:Circle",
        "Square": "tests.helpers.config_parts:Square",
        "Unfinished": "tests.helpers.config_parts:Unfinished",
    },
    "Paint": {"Red": "tests.helpers.config_parts:Red"},
}
