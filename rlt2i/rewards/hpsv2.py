"""HPSv2 and HPSv2.1: CLIP ViT-H/14 trained on rankings by people."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.rewards.clip_family import CLIPReward


@attrs.frozen(kw_only=True)
class HPSv2(CLIPReward):
    """The cosine itself, without the logit scale: about 0.2 to 0.35. Some tools print it times 100.

    The released checkpoints are open_clip's; they are converted once to a CLIPModel. Images are resized and
    cropped at the centre as the released package does; a variant that pads gives the same on square images.
    Wu et al. 2023, arXiv:2306.09341.

    Attributes:
        path: "hpsv2.1" or "hpsv2", or the folder of a converted model.
    """

    span = (-1.0, 1.0)

    path: str = "hpsv2.1"
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def of_cosine(self, cosine: Tensor, scale: Tensor) -> Tensor:
        return cosine
