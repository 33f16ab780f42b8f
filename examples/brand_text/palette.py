"""How well an image keeps to the colours of a brand: a reward in one file, in a recipe `palette.py:Palette`."""

from __future__ import annotations

import re
from typing import Any

import attrs
import torch
from attrs.validators import and_, ge, gt, le, min_len
from torch import Tensor
from torch.nn import functional as F

from rlt2i.interfaces import Reward, RewardBatch, RewardOutput

# sRGB to CIE XYZ (IEC 61966-2-1), each row divided by the white of D65.
_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


def lab(rgb: Tensor) -> Tensor:
    """CIELAB under D65 of sRGB.

    Args:
        rgb: [..., 3] in [0, 1].

    Returns:
        [..., 3]: L in [0, 100], a and b about -110 to 100.
    """
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(_XYZ, dtype=rgb.dtype, device=rgb.device)
    xyz = linear @ (matrix / matrix.sum(dim=1, keepdim=True)).T
    bent = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = bent.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def colour(text: str) -> tuple[float, float, float]:
    """#1F4D3A as three numbers in [0, 1].

    Raises:
        ValueError: for anything else.
    """
    if not re.fullmatch(r"#[0-9A-Fa-f]{6}", text):
        raise ValueError(f"Palette: the colour {text!r} is not of the form #1F4D3A.")
    red, green, blue = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


@attrs.frozen(kw_only=True)
class Palette(Reward):
    """Fit times a mixture with balance, in [0, 1].

    The image is averaged to `side` x `side` pixels. The distance d of a pixel is the Euclidean distance in CIELAB
    (CIE 1976) to the nearest colour of the palette; 2.3 is about what an eye just notices.

        fit     = mean over pixels of max(0, 1 - d / reach)
        balance = 1 - 1/2 sum_k |share_k - wanted_k|,   share_k = share of pixels whose nearest colour is k
        score   = fit x (1 - emphasis + emphasis x balance)

    Without balance, one flat colour would be the best image. Components: `fit`, `balance`. Maps: 1 - max(0, 1 - d /
    reach), where the image is off the palette.

    Attributes:
        colours: of the brand, as #RRGGBB.
        shares: wanted share of each, with sum 1; empty means equal ones.
        reach: distance from which on a pixel counts nothing.
        emphasis: of balance, 0 to 1.
        side: pixels a side that are looked at, or those of the image where it is smaller.
    """

    offers = frozenset({"maps"})
    span = (0.0, 1.0)

    colours: tuple[str, ...] = attrs.field(converter=tuple, validator=min_len(1))
    shares: tuple[float, ...] = attrs.field(default=(), converter=tuple)
    reach: float = attrs.field(default=40.0, validator=gt(0))
    emphasis: float = attrs.field(default=0.5, validator=and_(ge(0), le(1)))
    side: int = attrs.field(default=64, validator=ge(1))

    @colours.validator
    def _check_colours(self, _: Any, value: tuple[str, ...]) -> None:
        for text in value:
            colour(text)

    @shares.validator
    def _check_shares(self, _: Any, value: tuple[float, ...]) -> None:
        if value and (len(value) != len(self.colours) or min(value) < 0 or abs(sum(value) - 1) > 1e-6):
            raise ValueError(
                f"Palette(shares={value}): expected {len(self.colours)} shares, one for each colour, >= 0, with sum 1."
            )

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        images = batch.images.float() / 255
        size = [min(self.side, edge) for edge in images.shape[-2:]]
        pixels = lab(F.interpolate(images, size=size, mode="area").permute(0, 2, 3, 1))  # [B, h, w, 3]
        brand = lab(torch.tensor([colour(text) for text in self.colours], device=images.device))
        distance, nearest = torch.cdist(pixels.flatten(1, 2), brand.expand(len(pixels), -1, -1)).min(dim=-1)
        near = (1 - distance / self.reach).clamp(min=0)  # [B, h w]
        fit = near.mean(dim=1)
        shares = F.one_hot(nearest, len(self.colours)).float().mean(dim=1)
        wanted = torch.tensor(self.shares or [1 / len(self.colours)] * len(self.colours), device=images.device)
        balance = 1 - (shares - wanted).abs().sum(dim=1) / 2
        return RewardOutput(
            scores=fit * (1 - self.emphasis + self.emphasis * balance),
            valid=torch.ones(len(images), dtype=torch.bool),
            components={"fit": fit, "balance": balance},
            maps=(1 - near).unflatten(1, size) if "maps" in want else None,
        )
