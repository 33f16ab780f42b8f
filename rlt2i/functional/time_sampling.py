"""Times at which a forward-process loss is evaluated: sigmas (1 = noise), or indices where the name says so.

"shift" has two directions in published code: AWM and SD3 move times towards noise, Flow-Factory's option of
the same name towards the image (t = 1000 (1 - shift(f))). It is an argument here and never a default hidden
in a name.
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
    """
    if direction == "noise":
        return shift_sigma(sigma, shift)
    if direction == "image":
        return 1 - shift_sigma(1 - sigma, shift)
    raise ValueError(f"direction={direction!r}: times move towards 'noise' or towards the 'image'.")


def logit_normal_times(
    num: int, *, generator: torch.Generator, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Independent logit-normal times, shift(sigmoid(mean + std z)) (SD3, arXiv 2403.03206; AWM with shift 3).

    Args:
        num: N.
        generator: source of the draws; decides the device.
        mean: location; positive favours noise.
        std: width.
        shift: moves times towards noise.

    Returns:
        [N] float32 in (0, 1).
    """
    normal = torch.randn(num, generator=generator, device=generator.device)
    return shift_sigma(torch.sigmoid(mean + std * normal), shift)


def logit_normal_indices(
    num: int, *, generator: torch.Generator, size: int = 1000, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Indices floor(size u), u logit-normal, into `constructed_sigmas`: the times of Flow-GRPO's SFT and DPO.

    Args:
        num: N.
        generator: source of the draws; decides the device.
        size: number of training sigmas.
        mean: location of u; index 0 is pure noise.
        std: width of u.

    Returns:
        [N] long in [0, size).
    """
    u = logit_normal_times(num, generator=generator, mean=mean, std=std)
    return (u * size).long().clamp(max=size - 1)


def stratified_uniform(num: int, *, generator: torch.Generator) -> Tensor:
    """One uniform draw in each of N equal bins, in random order: less variance than N independent draws.

    Args:
        num: N.
        generator: source of the draws; decides the device.

    Returns:
        [N] float32 in [0, 1).
    """
    offsets = torch.rand(num, generator=generator, device=generator.device)
    places = (torch.arange(num, device=generator.device) + offsets) / num
    return places[torch.randperm(num, generator=generator, device=generator.device)]


def stratified_times(
    num: int,
    *,
    generator: torch.Generator,
    low: float = 0.0,
    high: float = 1.0,
    shift: float = 1.0,
    direction: Direction = "noise",
) -> Tensor:
    """Stratified uniform times in [low, high], then shifted (Flow-Factory's "uniform").

    Args:
        num: N.
        generator: source of the draws; decides the device.
        low: smallest sigma before the shift.
        high: largest sigma before the shift.
        shift: 1 for none.
        direction: of the shift; Flow-Factory "image".

    Returns:
        [N] float32.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low={low}, high={high}: times lie in [0, 1] and low is below high.")
    u = stratified_uniform(num, generator=generator)
    sigma = high - u * (high - low) if direction == "image" else low + u * (high - low)
    return shift_towards(sigma, shift, direction)


def stratified_logit_normal_times(
    num: int,
    *,
    generator: torch.Generator,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    direction: Direction = "noise",
) -> Tensor:
    """Stratified logit-normal times (Flow-Factory's "logit_normal"): sigmoid(mean + std z) of even quantiles.

    Args:
        num: N.
        generator: source of the draws; decides the device.
        mean: location of the logit of the time *before* a shift towards the image mirrors it.
        std: width.
        shift: 1 for none.
        direction: of the shift; Flow-Factory "image".

    Returns:
        [N] float32 in (0, 1).
    """
    quantile = stratified_uniform(num, generator=generator).clamp(1e-7, 1 - 1e-7)
    normal = math.sqrt(2.0) * torch.erfinv(2 * quantile - 1)
    moved = shift_sigma(torch.sigmoid(mean + std * normal), shift)
    return moved if direction == "noise" else 1 - moved


def stratified_steps(num: int, *, first: int, end: int, generator: torch.Generator) -> Tensor:
    """One step index in each of `num` bins of the sampler's own steps (AWM's "discrete", arXiv 2509.25050).

        bounds = floor(linspace(first, end, num + 1)),   index_j uniform in [bounds_j, bounds_{j+1})

    A bin without width gives its lower bound, so indices may repeat. AWM: end = int(T * fraction), first = 0
    ("discrete") or 1 ("discrete_wo_init", which never trains at pure noise).

    Args:
        num: N.
        first: smallest index.
        end: upper bound, excluded except from bins without width.
        generator: source of the draws; decides the device.

    Returns:
        [N] long, ascending.
    """
    if not 0 <= first <= end:
        raise ValueError(f"first={first}, end={end}: the range of steps is empty.")
    bounds = torch.linspace(first, end, num + 1, device=generator.device).long()
    width = bounds[1:] - bounds[:-1]
    draws = torch.rand(num, generator=generator, device=generator.device)
    return bounds[:-1] + (draws * width).long()
