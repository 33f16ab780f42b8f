"""PickScore: CLIP ViT-H/14 trained on half a million choices of people between two images."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.rewards.clip_family import CLIPReward


@attrs.frozen(kw_only=True)
class PickScore(CLIPReward):
    """exp(logit_scale) x cosine: the raw scale that papers report, about 16 to 26.

    Others train on this divided by 26; `Affine(scale=1/26)` says so where it is wanted. Component: `cosine`.
    Kirstain et al. 2023, arXiv:2305.01569.
    """

    span = (-100.0, 100.0)

    path: str = "yuvalkirstain/PickScore_v1"
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def of_cosine(self, cosine: Tensor, scale: Tensor) -> Tensor:
        return scale * cosine
