"""What the log says about a batch before anything is learned from it: its rewards, and the shape of its credit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlt2i.engine import Collected
from rlt2i.functional.groups import masked_std, tied
from rlt2i.functional.maps import effective_support
from rlt2i.functional.numerics import full_precision

_MAXIMA = ("map/max", "time/max")


def observations(batches: Sequence[Collected], mean: Callable[[Tensor], float]) -> dict[str, float]:
    """The metrics of an iteration.

    Args:
        batches: of this process, one for every image size.
        mean: over the elements of a tensor, and over all processes.
    """
    each = [_observed(batch) for batch in batches]
    names = dict.fromkeys(name for observed in each for name in observed)
    joined = {name: torch.cat([observed[name].flatten() for observed in each if name in observed]) for name in names}
    metrics = {name: mean(values) for name, values in joined.items() if name not in _MAXIMA}
    return metrics | {name: float(values.max()) for name, values in joined.items() if name in _MAXIMA}


def _observed(collected: Collected) -> dict[str, Tensor]:
    experience, rewards = collected.experience, collected.experience.rewards
    kept = rewards.valid
    size = collected.prompts.group_size
    by_group, judged = rewards.final.view(-1, size), kept.view(-1, size)
    compared = judged.any(dim=1)  # a group of which nothing was judged has no spread
    observed = {
        "reward/mean": rewards.final[kept],
        "reward/spread": masked_std(by_group, judged, 1, correction=0)[compared, 0],
        "reward/tied_groups": tied(by_group, judged)[compared, 0].float(),
        **{f"reward/{name}": values[kept] for name, values in rewards.terms.items()},
    }
    return observed | weight_statistics(experience.credit.weight, experience.trajectory.stochastic)


def weight_statistics(weight: Tensor, stochastic: Tensor) -> dict[str, Tensor]:
    """How concentrated a weight is, over the axes that it resolves; nothing for uniform credit.

    Over space every map is judged by itself. Over time it is the mean weight of each step, on the steps that are
    trained: the stochastic ones, or all of a deterministic rollout.

    Args:
        weight: [1|B, 1|T, 1|h, 1|w].
        stochastic: [T] bool.

    Returns:
        "map/..." [1|B, 1|T] where the weight resolves places, "time/..." [1|B] where it resolves steps: entropy
        relative to uniform, effective support as a share of the places or steps, and the largest weight.
    """
    statistics: dict[str, Tensor] = {}
    if weight.shape[2:] != (1, 1):
        statistics |= _concentration("map", weight)
    if weight.shape[1] > 1:
        steps = weight.mean(dim=(2, 3))
        trained = steps[:, stochastic] if stochastic.any() else steps
        statistics |= _concentration("time", trained[..., None])
    return statistics


def _concentration(axis: str, weight: Tensor) -> dict[str, Tensor]:
    """Of [..., h, w] weights."""
    return {
        f"{axis}/entropy": map_entropy(weight),
        f"{axis}/effective_support": effective_support(weight),
        f"{axis}/max": weight.amax(dim=(-2, -1)),
    }


def map_entropy(weight: Tensor) -> Tensor:
    """Entropy of a map as a fraction of the uniform map's, H(w / sum w) / log P.

    Args:
        weight: [..., h, w], non-negative, not all zero.

    Returns:
        [...] in [0, 1]; 1 for a constant map (also when there is a single location).
    """
    share = full_precision(weight).flatten(-2)
    share = share / share.sum(dim=-1, keepdim=True)
    highest = torch.log(torch.tensor(float(share.shape[-1]), dtype=share.dtype, device=share.device))
    entropy = -torch.xlogy(share, share).sum(dim=-1)
    flat = share.amax(dim=-1) == share.amin(dim=-1)
    return torch.where(flat, 1, (entropy / torch.where(highest > 0, highest, 1)).clamp(0, 1))
