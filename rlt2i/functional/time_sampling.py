"""Noise levels at which a forward-process loss is evaluated, from uniform or normal numbers that the caller draws.

"shift" has two directions in published code: AWM and SD3 move times towards noise, Flow-Factory's option of the same
name towards the image (t = 1000 (1 - shift(f))). It is an argument here and never a default hidden in a name.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from .schedules import shift_sigma

Direction = Literal["noise", "image"]


def shift_towards(sigma: Tensor, shift: float, direction: Direction) -> Tensor:
    """Move times by the SD3 shift, shift(sigma), or by its mirror image, 1 - shift(1 - sigma).

    Args:
        sigma: any shape, in [0, 1].
        shift: 1 changes nothing.
        direction: for shift > 1, towards "noise" (sigma grows) or towards the "image" (sigma falls).

    Returns:
        The same shape.

    Raises:
        ValueError: for an unknown direction.
    """
    if direction == "noise":
        return shift_sigma(sigma, shift)
    if direction == "image":
        return 1 - shift_sigma(1 - sigma, shift)
    raise ValueError(f"direction={direction!r}: times move towards 'noise' or towards the 'image'.")


def stratified_times(within: Tensor, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """One time in each of N equal parts of [low, high]: less variance than N independent draws.

    Args:
        within: [..., N] in [0, 1), where in its part each time lies.
        low: smallest sigma.
        high: largest sigma.

    Returns:
        [..., N] ascending.

    Raises:
        ValueError: unless low < high.
    """
    if not low < high:
        raise ValueError(f"low={low}, high={high}: low must be below high.")
    count = within.shape[-1]
    return low + (high - low) * (torch.arange(count, device=within.device) + within) / count


def normal_quantile(share: Tensor) -> Tensor:
    """The standard normal number below which a share of all of them lies; shares are kept 1e-7 away from 0 and 1.

    Args:
        share: any shape, in [0, 1].

    Returns:
        The same shape.
    """
    return math.sqrt(2.0) * torch.erfinv(2 * share.clamp(1e-7, 1 - 1e-7) - 1)


def logit_normal(normal: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Logit-normal times, sigmoid(mean + std z): most draws in the middle, where SD3 trains (arXiv 2403.03206; AWM).

    Args:
        normal: any shape, standard normal z.
        mean: location; positive favours noise.
        std: width.

    Returns:
        The same shape, in (0, 1).
    """
    return torch.sigmoid(mean + std * normal)


def stratified_steps(within: Tensor, *, first: int, last: int) -> Tensor:
    """One step index in each of N bins of the sampler's own steps (AWM's "discrete", arXiv 2509.25050).

        bounds = floor(linspace(first, last, N + 1)),   index_j uniform in [bounds_j, bounds_{j+1})

    A bin without width gives its lower bound, so indices may repeat. AWM: last = int(T * fraction), first = 0
    ("discrete") or 1 ("discrete_wo_init", which never trains at pure noise).

    Args:
        within: [..., N] in [0, 1), where in its bin each index lies.
        first: smallest index.
        last: upper bound, excluded except from bins without width.

    Returns:
        [..., N] long, ascending.

    Raises:
        ValueError: for an empty range of steps.
    """
    if not 0 <= first <= last:
        raise ValueError(f"first={first}, last={last}: the range of steps is empty.")
    bounds = torch.linspace(first, last, within.shape[-1] + 1, device=within.device).long()
    return bounds[:-1] + (within * bounds.diff()).long()
