"""CLIPScore: how well an image fits its prompt to a CLIP that was never trained on preferences."""

from __future__ import annotations

from typing import Literal

import attrs
from attrs import validators
from torch import Tensor

from rlt2i.rewards.clip_family import CLIPReward

CLIPScale = Literal["cosine", "hessel", "percent"]


@attrs.frozen(kw_only=True)
class CLIPScore(CLIPReward):
    """The cosine of image and prompt on one of the three scales in use. Component: `cosine`.

    Attributes:
        scale: "cosine" as it is (DiffusionNFT; about 0.15 to 0.35), "hessel" 2.5 x max(cosine, 0) (Hessel et
            al. 2021, arXiv:2104.08718, who also use ViT-B/32 and put "A photo depicts" before the text), or
            "percent" max(100 x cosine, 0) (torchmetrics). A number without its scale and model cannot be
            compared.
    """

    path: str = "openai/clip-vit-large-patch14"
    scale: CLIPScale = attrs.field(default="cosine", validator=validators.in_(("cosine", "hessel", "percent")))

    @property
    def span(self) -> tuple[float, float]:
        return {"cosine": (-1.0, 1.0), "hessel": (0.0, 2.5), "percent": (0.0, 100.0)}[self.scale]

    def of_cosine(self, cosine: Tensor, scale: Tensor) -> Tensor:
        if self.scale == "cosine":
            return cosine
        return (2.5 if self.scale == "hessel" else 100.0) * cosine.clamp_min(0)
