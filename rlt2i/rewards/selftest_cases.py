"""A good picture and bad ones per reward, drawn by code: nothing is shipped and nothing is downloaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 512
_WHITE, _SKY, _RED, _BLUE = (255, 255, 255), (170, 200, 235), (220, 40, 40), (40, 70, 215)


@attrs.frozen(kw_only=True, eq=False)
class Case:
    """What a reward must tell apart.

    Attributes:
        prompt, metadata: of all pictures.
        good: [3, H, W] uint8 RGB.
        bad: name -> picture; each must score less.
        general: made for rewards that compare an image with its prompt, without knowing whether this one does.
    """

    prompt: str
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    good: Tensor
    bad: Mapping[str, Tensor]
    general: bool = False

    def reversed(self) -> Case:
        """For a reward whose sign was turned."""
        ((_, worst),) = list(self.bad.items())[:1]
        return attrs.evolve(self, good=worst, bad={"what was good": self.good})


def text_case() -> Case:
    """The right sign, a wrong one, and none."""
    target = "GRAND OPENING"
    return Case(
        prompt=f'A sign that says "{target}"',
        metadata={"text": target},
        good=_sign(target),
        bad={"another text": _sign("CLOSED TODAY"), "no text": _tensor(Image.new("RGB", (SIDE, SIDE), _SKY))},
    )


def drawing_case() -> Case:
    """A red circle, against a blue square and noise: for all that compares an image with its prompt."""
    square = Image.new("RGB", (SIDE, SIDE), _WHITE)
    ImageDraw.Draw(square).rectangle((120, 120, 390, 390), fill=_BLUE)
    circle = Image.new("RGB", (SIDE, SIDE), _WHITE)
    ImageDraw.Draw(circle).ellipse((110, 110, 400, 400), fill=_RED)
    return Case(
        prompt="a red circle on a white background",
        good=_tensor(circle),
        bad={"a blue square": _tensor(square), "noise": _noise()},
    )


def questions_case() -> Case:
    """The same drawing with atomic questions about it: for judges that answer them."""
    questions = [
        ["Are there any circles in the image?", "Yes"],
        ["How many circles are in the image?", "one"],
        ["Is the circle red?", "Yes"],
    ]
    skills = ["object", "count", "attribute"]
    return attrs.evolve(drawing_case(), metadata={"vqa_list": questions, "skills": skills})


def beauty_case() -> Case:
    """A soft evening sky against noise and grey: for rewards that look at the image alone."""
    return Case(
        prompt="an evening sky",
        good=_evening(),
        bad={"noise": _noise(), "grey": torch.full((3, SIDE, SIDE), 127, dtype=torch.uint8)},
    )


def size_case() -> Case:
    """Plain against noisy: for compressibility."""
    return Case(prompt="", good=_evening(), bad={"noise": _noise()})


def shapes_case() -> Case:
    """One red circle of the shapes world, against a blue one, a red square and nothing."""
    metadata = {
        "text": "a red circle",
        "category": "colors",
        "objects": [["circle", "red"]],
        "count": 1,
        "relation": None,
    }
    blue, square, empty = _shape(_BLUE, "circle"), _shape(_RED, "square"), _shape(None, "circle")
    return Case(
        prompt="a red circle",
        metadata=metadata,
        good=_shape(_RED, "circle"),
        bad={"a blue circle": blue, "a red square": square, "nothing": empty},
    )


def cells_case() -> Case:
    """A red circle in the first of 2 x 2 cells, against a blue one, a red square and the circle in another cell."""
    red, elsewhere = _shape(_RED, "circle", (3, 3, 12, 12)), _shape(_RED, "circle", (19, 3, 28, 12))
    blue, square = _shape(_BLUE, "circle", (3, 3, 12, 12)), _shape(_RED, "square", (3, 3, 12, 12))
    return Case(
        prompt="a red circle above left",
        metadata={"grid": 2, "cells": [[0, "circle", "red"]]},
        good=red,
        bad={"a blue circle": blue, "a red square": square, "the circle above right": elsewhere},
    )


def green_case() -> Case:
    """Green above left, against green below right."""
    green = torch.zeros(3, 32, 32, dtype=torch.uint8)
    green[1, :16, :16] = 200
    return Case(prompt="", good=green, bad={"green below right": green.flip((1, 2))})


def objects_case() -> Case:
    """A stop sign by the road, against the road: for object detectors."""
    return Case(
        prompt="a photo of a stop sign",
        metadata={"tag": "single_object", "include": [{"class": "stop sign", "count": 1}]},
        good=_road(with_sign=True),
        bad={"no sign": _road(with_sign=False)},
    )


CASES: Mapping[str, Callable[[], Case]] = MappingProxyType(
    {
        "Aesthetic": beauty_case,
        "CellsReward": cells_case,
        "CornerReward": green_case,
        "GenEval2Reward": questions_case,
        "GenEvalReward": objects_case,
        "JPEGCompressibility": size_case,
        "JPEGIncompressibility": lambda: size_case().reversed(),
        "OCRReward": text_case,
        "ShapesReward": shapes_case,
    }
)
"""Class name -> case; every other reward that needs no metadata gets `drawing_case`."""


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _sign(text: str) -> Tensor:
    image = Image.new("RGB", (SIDE, SIDE), _SKY)
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((40, 150, 472, 360), 20, fill=(250, 245, 225), outline=(60, 50, 40), width=6)
    for row, word in enumerate(text.split()):
        draw.text((SIDE / 2, 210 + 90 * row), word, font=ImageFont.load_default(64), fill=(30, 30, 60), anchor="mm")
    return _tensor(image)


def _noise() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def _evening() -> Tensor:
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    sky = np.stack([250 - 90 * y, 120 + 60 * y, 110 + 110 * (1 - y)], axis=-1)
    sun = np.exp(-((x - 0.62) ** 2 + (y - 0.55) ** 2) / 0.02)[..., None] * np.array([60, 90, 20])
    hills = (y > 0.75 + 0.06 * np.sin(7 * x) + 0.03 * np.sin(19 * x + 1))[..., None]
    picture = np.where(hills, np.array([45, 40, 70]) + 20 * x[..., None], sky + sun)
    return _tensor(Image.fromarray(picture.clip(0, 255).astype(np.uint8)))


def _shape(
    colour: tuple[int, int, int] | None, shape: str, box: tuple[int, int, int, int] = (10, 10, 21, 21)
) -> Tensor:
    image = Image.new("RGB", (32, 32), (200, 200, 200))
    draw = ImageDraw.Draw(image)
    if colour is not None:
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
    return _tensor(image)


def _road(*, with_sign: bool) -> Tensor:
    image = Image.new("RGB", (SIDE, SIDE), _SKY)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 330, SIDE, SIDE), fill=(96, 140, 80))
    draw.polygon([(60, SIDE), (236, 330), (276, 330), (452, SIDE)], fill=(90, 90, 95))
    if with_sign:
        draw.rectangle((362, 200, 374, 440), fill=(140, 140, 145))
        for radius, colour in ((92, _WHITE), (84, (190, 25, 35))):
            angles = [math.pi / 8 + math.pi / 4 * corner for corner in range(8)]
            corners = [(368 + radius * math.cos(a), 160 + radius * math.sin(a)) for a in angles]
            draw.polygon(corners, fill=colour)
        draw.text((368, 160), "STOP", font=ImageFont.load_default(52), fill=_WHITE, anchor="mm")
    return _tensor(image)
