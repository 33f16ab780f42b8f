"""From text-image attention to a spatial allocation of reward: our reconstruction of STAR (arXiv 2606.17979).

The paper's equations are not public in what we could read. Every choice below is a named knob; reference
values come from the works named in the arguments.
"""

from typing import Literal

import torch
from torch import Tensor

from .maps import blur2d, effective_support, inverted_map, mean_one, rank_map
from .numerics import full_precision

__all__ = ["attention_allocation", "inverted_map", "mean_one"]

Aggregate = Literal["mean", "max", "softmax"]
Normalise = Literal["mean_one", "minmax", "sum_one", "rank"]


def attention_allocation(
    maps: Tensor,
    *,
    mix: float = 0.5,
    sharpness: float = 1.0,
    blur: float = 1.0,
    floor: float = 0.25,
    ceiling: float = 4.0,
    doubt: float = 0.5,
    aggregate: Aggregate = "mean",
    normalise: Normalise = "mean_one",
) -> Tensor:
    """Turn attention maps of the core concepts into one weight map per rollout and step.

        a^_k  = a_k / mean_p a_k                             big and small objects count alike
        s     = aggregate_k a^_k
        m     = normalise( blur(s) ^ sharpness )
        mix_t = mix (1 - (sum m)^2 / (P sum m^2))^doubt       an unsure map falls back to uniform
        M     = clip( (1 - mix_t) + mix_t m, floor, ceiling ), then mean one over space

    Concepts without any attention mass do not count. The result is exactly one everywhere where no concept
    has mass, where the aggregated map is constant, and for mix = 0. The caller detaches.

    Args:
        maps: [B, T, K, h, w] non-negative attention mass of K concepts.
        mix: lambda in [0, 1]; 0 is Flow-GRPO, 1 the pure map.
        sharpness: gamma > 0.
        blur: width of the Gaussian in grid cells (ViPO, arXiv 2511.18719, reports that maps need smoothing).
        floor: smallest weight, in [0, 1] (a hard mask loses the direction of the gradient once information
            spreads).
        ceiling: largest weight, >= 1.
        doubt: >= 0; 0 keeps mix constant. The base is the share of places that the map does not use (Kish), which is
            the same for the same picture on a grid of any size.
        aggregate: over concepts; "softmax" weighs each concept by the softmax of its own map at that place.
        normalise: "mean_one" and "rank" give mean one over space; "minmax" (ViPO) gives m in [0, 1] and
            "sum_one" m with sum 1, both without the final normalisation, so they lower the effective learning
            rate.

    Returns:
        [B, T, h, w].
    """
    _check_knobs(maps, mix, sharpness, floor, ceiling, doubt)
    maps = full_precision(maps)
    mass = maps.mean(dim=(-2, -1), keepdim=True)
    counts = mass > 0
    relative = torch.where(counts, maps / torch.where(counts, mass, 1), 0)
    salience = _aggregate(relative, counts, aggregate)
    uniform = salience.amax(dim=(-2, -1), keepdim=True) == salience.amin(dim=(-2, -1), keepdim=True)
    # Uniform places take part as ones so that nothing below divides by zero; they are overwritten at the end.
    smooth = blur2d(torch.where(uniform, 1, salience), blur)
    sharp = (smooth / smooth.amax(dim=(-2, -1), keepdim=True)) ** sharpness
    shape = _normalise(sharp, normalise)
    unused = (1 - effective_support(sharp)).clamp(0, 1)[..., None, None]
    mix_t = mix * unused**doubt
    weight = (1 - mix_t + mix_t * shape).clamp(floor, ceiling)
    if normalise in ("mean_one", "rank"):
        weight = weight / weight.mean(dim=(-2, -1), keepdim=True)
    return torch.where(uniform, 1, weight)


def _aggregate(relative: Tensor, counts: Tensor, how: Aggregate) -> Tensor:
    """[B, T, K, h, w] and [B, T, K, 1, 1] -> [B, T, h, w]; all zero where no concept counts."""
    if how == "mean":
        return relative.sum(dim=2) / counts.sum(dim=2).clamp(min=1)
    if how == "max":
        return relative.amax(dim=2)
    if how == "softmax":
        # A finite low logit instead of -inf: a place where nothing counts must give 0, not nan.
        logits = torch.where(counts, relative, torch.finfo(relative.dtype).min)
        return (torch.softmax(logits, dim=2) * relative).sum(dim=2)
    raise ValueError(f"aggregate={how!r}: unknown rule over concepts. Use 'mean', 'max' or 'softmax'.")


def _normalise(sharp: Tensor, how: Normalise) -> Tensor:
    if how == "mean_one":
        return sharp / sharp.mean(dim=(-2, -1), keepdim=True)
    if how == "rank":
        return rank_map(sharp)
    if how == "sum_one":
        return sharp / sharp.sum(dim=(-2, -1), keepdim=True)
    if how == "minmax":
        low, high = sharp.amin(dim=(-2, -1), keepdim=True), sharp.amax(dim=(-2, -1), keepdim=True)
        return torch.where(high > low, (sharp - low) / torch.where(high > low, high - low, 1), 1)
    raise ValueError(f"normalise={how!r}: unknown normalisation. Use 'mean_one', 'minmax', 'sum_one' or 'rank'.")


def _check_knobs(maps: Tensor, mix: float, sharpness: float, floor: float, ceiling: float, doubt: float) -> None:
    if maps.ndim != 5 or maps.shape[2] == 0:
        raise ValueError(f"maps have shape {tuple(maps.shape)}; pass [B, T, K, h, w] with at least one concept.")
    if not bool((maps >= 0).all()):
        raise ValueError("maps hold negative values or nan. Pass attention mass after the softmax, not logits.")
    if not 0 <= mix <= 1:
        raise ValueError(f"mix={mix}: a share lies in [0, 1]; 0 is uniform credit, 1 the pure map.")
    if sharpness <= 0:
        raise ValueError(f"sharpness={sharpness}: use a positive exponent; 1 leaves the map as it is.")
    if not 0 <= floor <= 1 <= ceiling:
        raise ValueError(f"floor={floor}, ceiling={ceiling}: uniform weight 1 must lie in [floor, ceiling].")
    if doubt < 0:
        raise ValueError(f"doubt={doubt}: use 0 for a constant mix, or a positive power.")
