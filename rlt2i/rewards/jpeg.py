"""How small or large an image is as a JPEG: rewards without weights, for tests and first runs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from attrs import validators
from PIL import Image, features
from torch import Tensor

from rlt2i.interfaces import CODE, Reward, RewardBatch, RewardOutput


def jpeg_kilobytes(images: Tensor, quality: int) -> Tensor:
    """[B] float32 sizes in kB (1,000 bytes) of [B, 3, H, W] uint8 RGB; they depend on the libjpeg build.

    Pillow writes them: the encoders of torchvision.io are deprecated since 0.29.
    """
    sizes = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


@attrs.frozen(kw_only=True)
class JPEGCompressibility(Reward):
    """-(kB of the JPEG): plain images win. Others train on this divided by 500 (`Affine(scale=1/500)`).

    Attributes:
        quality: of the JPEG, 1 to 95.
    """

    quality: int = attrs.field(default=95, validator=[validators.ge(1), validators.le(95)])

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        return _output(-jpeg_kilobytes(batch.images, self.quality))

    def fingerprint(self) -> dict[str, Any]:
        return _fingerprint(self)


@attrs.frozen(kw_only=True)
class JPEGIncompressibility(Reward):
    """kB of the JPEG: detail and noise win.

    Attributes:
        quality: of the JPEG, 1 to 95.
    """

    quality: int = attrs.field(default=95, validator=[validators.ge(1), validators.le(95)])

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        return _output(jpeg_kilobytes(batch.images, self.quality))

    def fingerprint(self) -> dict[str, Any]:
        return _fingerprint(self)


def _output(scores: Tensor) -> RewardOutput:
    return RewardOutput.all_valid(scores)


def _fingerprint(reward: JPEGCompressibility | JPEGIncompressibility) -> dict[str, Any]:
    encoder = features.version("libjpeg_turbo") or features.version("jpg")
    return {"reward": type(reward).__name__, "quality": reward.quality, "encoder": f"libjpeg {encoder}", "code": CODE}
