"""Feature saliency: credit goes to what stands out in the finished image, to the eyes of a vision transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor
from torch.nn.functional import interpolate

from rlt2i.config import neutral
from rlt2i.credit.algebra import Allocation
from rlt2i.credit.spatial import relative_weight
from rlt2i.functional.maps import blur2d
from rlt2i.interfaces import CreditContext
from rlt2i.types import Causality
from rlt2i.vision.patch_features import bytes_of, patch_features

_IMAGES_PER_PASS = 32


@attrs.frozen(kw_only=True)
class FeatureSaliency(Allocation):
    """Patch features of the finished image, projected on their principal components (ViPO, arXiv 2511.18719).

    The map is the sum of the components, each scaled to [0, 1] and weighted by the variance it explains; it is the
    same at every denoising step. A component has no sign of its own: here the side that the border of the image is on
    counts as background. An image without any structure gets the uniform map.

    Attributes:
        model: name of a vision transformer in timm, or a folder with one (config.json and model.safetensors). It is
            loaded when the first batch is judged, and it needs `pip install 'rlt2i[dino]'`.
        resolution: pixels a side of what the transformer sees; a multiple of its patch size.
        components: how many principal components count.
        blur: standard deviation of a Gaussian blur, in patches.
        mix: share of the saliency map against the uniform map.
        floor: weight of the least salient place, relative to the most salient one.
        normalise: "minmax" is the paper's M, scaled to [0, 1] and without floor: it lowers the step size by its mean,
            where "mean_one" keeps it.
    """

    causality: Causality = attrs.field(default="outcome", init=False)

    model: str = "vit_base_patch14_reg4_dinov2.lvd142m"
    resolution: int = attrs.field(default=224, validator=validators.ge(8))
    components: int = attrs.field(default=3, validator=validators.ge(1))
    blur: float = attrs.field(default=1.0, validator=validators.ge(0))
    mix: float = attrs.field(default=0.5, validator=[validators.ge(0.0), validators.le(1.0)])
    floor: float = attrs.field(default=0.02, validator=[validators.gt(0.0), validators.le(1.0)])
    normalise: Literal["mean_one", "minmax"] = neutral("mean_one", validator=validators.in_(("mean_one", "minmax")))

    def networks(self) -> Mapping[str, int | None]:
        """Networks that it keeps on the policy's device -> bytes, as of a reward."""
        return {self.model: bytes_of(self.model)}

    def weight(self, context: CreditContext) -> Tensor:
        device = context.trajectory.latents.device
        features = torch.cat(
            [
                patch_features(images.to(device), self.model, self.resolution)
                for images in context.images.split(_IMAGES_PER_PASS)
            ]
        )
        saliency = blur2d(principal_saliency(features, self.components), self.blur)
        on_tokens = interpolate(
            saliency[:, None], size=context.token_grid, mode="bilinear", align_corners=False, antialias=True
        )
        if self.normalise == "minmax":
            return 1 - self.mix + self.mix * unit_range(on_tokens)
        return relative_weight(on_tokens.clamp_min(0), mix=self.mix, floor=self.floor)


def unit_range(maps: Tensor) -> Tensor:
    """[..., h, w] scaled to [0, 1] over space; ones where a map is constant."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return torch.where(high > low, (maps - low) / torch.where(high > low, high - low, 1), 1)


def principal_saliency(features: Tensor, components: int) -> Tensor:
    """How much each patch stands out along the directions in which an image's patches differ most.

        S = sum_k lambda_k z_k,   lambda_k the share of variance of component k, z_k its projection scaled to [0, 1]

    Args:
        features: [B, h, w, D].
        components: how many to add up; fewer where there are no more.

    Returns:
        [B, h, w] in [0, 1]; 0 for an image whose patches are all alike.
    """
    height, width = features.shape[1:3]
    flat = features.float().flatten(1, 2)
    left, scale, _ = torch.linalg.svd(flat - flat.mean(dim=1, keepdim=True), full_matrices=False)
    left, variance = left[..., :components], scale[:, :components] ** 2
    border = torch.ones(height, width, dtype=torch.bool, device=features.device)
    border[1:-1, 1:-1] = False
    # Projections have mean zero over the patches, so a positive mean over the border means it is on the high side.
    sign = torch.where(left[:, border.flatten()].mean(dim=1, keepdim=True) > 0, -1.0, 1.0)
    oriented = left * sign
    low, high = oriented.amin(dim=1, keepdim=True), oriented.amax(dim=1, keepdim=True)
    unit = (oriented - low) / (high - low).clamp_min(1e-12)
    total = variance.sum(dim=1, keepdim=True)
    structured = total > 1e-10 * flat.pow(2).sum(dim=(1, 2))[:, None]  # below that it is rounding noise
    share = torch.where(structured, variance / total.clamp_min(1e-30), 0)
    return (unit * share[:, None]).sum(dim=2).unflatten(1, (height, width))
