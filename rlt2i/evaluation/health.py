"""What collapse looks like, measured without any reward: images that a reward likes and nobody else does.

Every measure takes uint8 RGB images [B, 3, H, W] and returns one float32 per image; diversity takes features
and returns one per group. Alone a number means little; next to the same number before training it shows
flattening (edge density, entropy and high frequencies fall), darkening, over-saturation, grids and noise
(high frequencies rise) and copies (diversity falls).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

_IMAGES_PER_PASS = 64
# ITU-R BT.601, the luma of JPEG.
_LUMA = (0.299, 0.587, 0.114)


def edge_density(images: Tensor, *, threshold: float = 0.1) -> Tensor:
    """Share of pixels with a luma step: mean[ sqrt(dx^2 + dy^2) > threshold ].

    dx, dy are forward differences of the luma in [0, 1], over the (H-1) x (W-1) pixels that have both.

    Returns:
        [B] in [0, 1].
    """
    luma = _luma(images)
    dx = (luma[:, :, 1:] - luma[:, :, :-1])[:, :-1]
    dy = (luma[:, 1:] - luma[:, :-1])[:, :, :-1]
    return (dx.square() + dy.square() > threshold**2).float().mean(dim=(1, 2))


def colour_entropy(images: Tensor, *, levels: int = 8) -> Tensor:
    """Entropy of the colour histogram: -sum p log2 p over levels^3 equal boxes of RGB.

    Returns:
        [B] bits, in [0, 3 log2(levels)].
    """
    _check(images)
    box = images.int() * levels // 256
    index = ((box[:, 0] * levels + box[:, 1]) * levels + box[:, 2]).flatten(1).long()
    counts = torch.zeros(len(images), levels**3, device=images.device)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))
    nats: Tensor = torch.special.entr(counts / index.shape[1]).sum(dim=1)
    return nats / math.log(2)


def saturation(images: Tensor) -> Tensor:
    """Mean HSV saturation: (max - min) / max over the channels, 0 for black.

    Returns:
        [B] in [0, 1].
    """
    _check(images)
    high, low = images.amax(dim=1).float(), images.amin(dim=1).float()
    return ((high - low) / high.clamp(min=1)).mean(dim=(1, 2))


def dark_fraction(images: Tensor, *, threshold: float = 0.1) -> Tensor:
    """Share of pixels with luma < threshold.

    Returns:
        [B] in [0, 1].
    """
    return (_luma(images) < threshold).float().mean(dim=(1, 2))


def high_frequency_energy(images: Tensor, *, cutoff: float = 0.25) -> Tensor:
    """Share of the luma's spectral energy, without the mean, at max(|fx|, |fy|) > cutoff cycles per pixel.

    By Parseval the spectrum's energy is the luma's variance; 0.5 is the finest pattern that a pixel grid
    carries. White noise lies near 1 - (2 cutoff)^2, a checkerboard at 1.

    Returns:
        [B] in [0, 1]; 0 for a flat image.
    """
    luma = _luma(images)
    spectrum = torch.fft.fft2(luma - luma.mean(dim=(1, 2), keepdim=True)).abs().square()
    fy, fx = (torch.fft.fftfreq(n, device=images.device).abs() for n in luma.shape[1:])
    fine = torch.maximum(fy[:, None], fx[None, :]) > cutoff
    total = spectrum.sum(dim=(1, 2))
    # What remains of a flat image is rounding: below a tenth of one grey level, squared.
    flat = total / luma[0].numel() ** 2 < (0.1 / 255) ** 2
    return torch.where(flat, 0.0, (spectrum * fine).sum(dim=(1, 2)) / total)


def pixel_features(images: Tensor, *, side: int = 16) -> Tensor:
    """[B, 3 * side^2] float32: images averaged down, in [-0.5, 0.5], for want of an embedding."""
    _check(images)
    return adaptive_avg_pool2d(images.float() / 255 - 0.5, side).flatten(1)


def mean_cosine_distance(features: Tensor, group_size: int) -> Tensor:
    """Mean cosine distance between the members of each group: mean over i < j of 1 - cos(f_i, f_j).

    Args:
        features: [B, D]; the G members of a group are adjacent.
        group_size: G >= 2, divides B.

    Returns:
        [B / G] float32 in [0, 2]; 0 for G copies.
    """
    unit = torch.nn.functional.normalize(_grouped(features, group_size).double(), dim=2)
    cosines = unit @ unit.mT
    off_diagonal = cosines.sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (1 - off_diagonal / (group_size * (group_size - 1))).clamp(min=0).float()


def vendi_score(features: Tensor, group_size: int) -> Tensor:
    """Effective number of different members of each group (arXiv 2210.02410): exp(-sum l log l).

    l are the eigenvalues of K / G, K_ij = cos(f_i, f_j). It is 1 for G copies and G for G orthogonal
    features.

    Args:
        features: [B, D]; the G members of a group are adjacent.
        group_size: G >= 2, divides B.

    Returns:
        [B / G] float32 in [1, G].
    """
    unit = torch.nn.functional.normalize(_grouped(features, group_size).double(), dim=2)
    eigenvalues = torch.linalg.eigvalsh(unit @ unit.mT / group_size)
    nats: Tensor = torch.special.entr(eigenvalues.clamp(min=0)).sum(dim=1)
    return nats.exp().float()


MEASURES = (edge_density, colour_entropy, saturation, dark_fraction, high_frequency_energy)
"""What is measured of every image: [B, 3, H, W] uint8 -> [B]."""


def diversity_metrics(images: Tensor, group_size: int) -> dict[str, Tensor]:
    """How much the images of one prompt differ, in averaged pixels: "diversity/cosine_distance" and
    "diversity/vendi", [B / G] each.

    Args:
        images: [B, 3, H, W] uint8; the G images of a prompt are adjacent.
        group_size: G >= 2, divides B.
    """
    features = torch.cat([pixel_features(chunk) for chunk in images.split(_IMAGES_PER_PASS)])
    return {
        "diversity/cosine_distance": mean_cosine_distance(features, group_size),
        "diversity/vendi": vendi_score(features, group_size),
    }


def health_metrics(images: Tensor) -> dict[str, Tensor]:
    """Means of all measures of [B, 3, H, W] uint8 images for the log, "health/<measure>"."""
    return {f"health/{measure.__name__}": measure(images).mean() for measure in MEASURES}


def _check(images: Tensor) -> None:
    if images.dtype is not torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"health: got {images.dtype} {list(images.shape)}, expected uint8 [B, 3, H, W]. Convert with to_uint8."
        )


def _luma(images: Tensor) -> Tensor:
    """[B, H, W] in [0, 1]."""
    _check(images)
    return torch.einsum("bchw,c->bhw", images.float() / 255, torch.tensor(_LUMA, device=images.device))


def _grouped(features: Tensor, group_size: int) -> Tensor:
    if features.ndim != 2 or group_size < 2 or len(features) % group_size:
        raise ValueError(
            f"health: features {list(features.shape)} with group_size={group_size}; expected [B, D] in "
            "whole groups of 2 or more."
        )
    return features.float().reshape(-1, group_size, features.shape[1])
