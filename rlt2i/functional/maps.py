"""Operations on weight maps: normalisation, smoothing, controls to compare a map with, statistics."""

import torch
from torch import Tensor

from .numerics import full_precision

Dims = int | tuple[int, ...]


def mean_one(weight: Tensor, dims: Dims) -> Tensor:
    """Scale non-negative weights to mean one over the axes they resolve.

    With mean one, a map moves the learning rate around and never changes it.

    Args:
        weight: any shape, non-negative.
        dims: axes to normalise over.

    Returns:
        The same shape; exactly ones where the weights are constant or vanish over `dims`.
    """
    weight = full_precision(weight)
    mean = weight.mean(dim=dims, keepdim=True)
    flat = weight.amax(dim=dims, keepdim=True) == weight.amin(dim=dims, keepdim=True)
    return torch.where(flat | (mean <= 0), 1, weight / torch.where(mean > 0, mean, 1))


def blur2d(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur over the last two axes; at the border the kernel is renormalised to the cells that exist.

    Each axis is a small row-stochastic matrix K_ij ~ exp(-(i - j)^2 / (2 sigma^2)), so a constant stays
    constant and no weight leaks out of the picture.

    Args:
        maps: [..., h, w].
        sigma: width in cells; 0 returns the maps as they are.

    Returns:
        [..., h, w].

    Raises:
        ValueError: for a negative width.
    """
    if sigma < 0:
        raise ValueError(f"blur={sigma}: a width is not negative. Use 0 for no blur.")
    maps = full_precision(maps)
    if sigma < 1e-3:  # no neighbour would get any weight, and sigma^2 may underflow
        return maps
    rows, columns = (_blur_matrix(size, sigma, maps) for size in maps.shape[-2:])
    return rows @ maps @ columns.mT


def rank_map(maps: Tensor) -> Tensor:
    """Replace values by their rank over the last two axes, scaled to mean one; ties share their average rank.

    Args:
        maps: [..., h, w].

    Returns:
        [..., h, w] in (0, 2).
    """
    flat = full_precision(maps).flatten(-2)
    ordered = flat.sort(dim=-1).values
    below = torch.searchsorted(ordered, flat.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, flat.contiguous(), right=True)
    average_rank = (below + 1 + up_to).to(flat.dtype) / 2
    return (average_rank * 2 / (flat.shape[-1] + 1)).view(maps.shape)


def inverted_map(weight: Tensor) -> Tensor:
    """Control: exchange important and unimportant places, w -> max + min - w, then mean one.

    Args:
        weight: [..., h, w], non-negative.

    Returns:
        [..., h, w], mean one over space; a constant map stays ones.
    """
    weight = full_precision(weight)
    high, low = weight.amax(dim=(-2, -1), keepdim=True), weight.amin(dim=(-2, -1), keepdim=True)
    return mean_one(high + low - weight, (-2, -1))


def residual_contrast(error_better: Tensor, error_worse: Tensor) -> Tensor:
    """ToPO's signal: where the frozen reference tells a preferred image from a rejected one.

        W_p ~ | e+_p - e-_p |

    Args:
        error_better: [B, H, W] flow-matching error map of the preferred image.
        error_worse: [B, H, W] of the rejected image, same noise and sigma.

    Returns:
        [B, H, W], mean one; mix it with ones before use.
    """
    return mean_one((full_precision(error_better) - full_precision(error_worse)).abs(), (-2, -1))


def effective_support(weight: Tensor) -> Tensor:
    """Effective share of locations that a map uses, (sum w)^2 / (P sum w^2) (Kish's effective sample size).

    Args:
        weight: [..., h, w], non-negative, not all zero.

    Returns:
        [...] in (0, 1]; 1 for a constant map, k / P for a mask of k locations.
    """
    flat = full_precision(weight).flatten(-2)
    return flat.sum(dim=-1) ** 2 / (flat.shape[-1] * (flat**2).sum(dim=-1))


def _blur_matrix(size: int, sigma: float, like: Tensor) -> Tensor:
    place = torch.arange(size, dtype=like.dtype, device=like.device)
    kernel = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    return kernel / kernel.sum(dim=1, keepdim=True)
