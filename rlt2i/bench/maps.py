"""What can be said of allocation maps without training: where they lie, how concentrated they are, what they move.

Every measure returns one number per rollout and step, or per rollout; means and errors are taken over batches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from rlt2i.interfaces import CreditContext


def localisation_lift(weight: Tensor, inside: Tensor) -> Tensor:
    """How much more weight than area lies in a region: (sum of w inside / sum of w) / (area inside / area).

    1 for a map that knows nothing, 1/a for one that holds a region of area a and nothing else, 0 for one beside it.

    Args:
        weight: [B, T, h, w] >= 0.
        inside: [B, h, w] bool.

    Returns:
        [B, T]; nan where a region is empty or everything.
    """
    region = inside[:, None].float()
    share = (weight * region).sum(dim=(2, 3)) / weight.sum(dim=(2, 3)).clamp_min(1e-12)
    area = region.mean(dim=(2, 3))
    return torch.where((area > 0) & (area < 1), share / area.clamp_min(1e-12), torch.nan)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation along the last axis, ties by their mean rank; nan where one side is constant.

    Args:
        a, b: [N, P].

    Returns:
        [N].
    """
    ranks_a, ranks_b = (_ranks(values) for values in (a, b))
    ranks_a, ranks_b = (ranks - ranks.mean(dim=1, keepdim=True) for ranks in (ranks_a, ranks_b))
    norm = ranks_a.norm(dim=1) * ranks_b.norm(dim=1)
    return torch.where(norm > 0, (ranks_a * ranks_b).sum(dim=1) / norm.clamp_min(1e-12), torch.nan)


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, :, None] > values[:, None, :]).double().sum(dim=2)
    return below + 0.5 * (values[:, :, None] == values[:, None, :]).double().sum(dim=2)


def overlap_of_peaks(a: Tensor, b: Tensor, *, share: float = 0.25) -> Tensor:
    """Intersection over union of the places with the highest weights in two maps.

    Args:
        a, b: [N, P].
        share: of the places that count as high; ties are broken by position.

    Returns:
        [N] in [0, 1]; two maps without relation have share / (2 - share).
    """
    count = max(1, round(share * a.shape[1]))
    high = [torch.zeros_like(v).scatter(1, v.topk(count, dim=1).indices, 1.0) for v in (a, b)]
    both = (high[0] * high[1]).sum(dim=1)
    return both / (2 * count - both)


def blocks_of(weight: Tensor, blocks: int) -> Tensor:
    """[N, h, w] -> [N, blocks^2], averaged."""
    return adaptive_avg_pool2d(weight[:, None], blocks).flatten(1)


def share_by_decile(values: Tensor, weight: Tensor, *, parts: int = 10) -> Tensor:
    """Mean of `values` among the places of the lowest weights, the next, ... up to the highest.

    Args:
        values, weight: [N] each, of single places.
        parts: of equal size.

    Returns:
        [parts].
    """
    order = weight.argsort(stable=True)
    return torch.stack([part.mean() for part in values[order].tensor_split(parts)])


@torch.no_grad()
def step_gains(context: CreditContext, steps: tuple[int, ...]) -> Tensor:
    """What each step did to the reward: R(ODE from its end) - R(ODE from its start).

    Args:
        context: of a rollout batch.
        steps: S of them, in order.

    Returns:
        [B, S]; nan where a reward failed.
    """
    trajectory = context.trajectory
    rollouts = torch.arange(trajectory.num_rollouts, device=trajectory.latents.device)
    known: dict[int, Tensor] = {}

    def reward_from(step: int) -> Tensor:
        if step not in known:
            output = context.score(context.complete(trajectory.latents[:, step], step, rollouts), rollouts)
            known[step] = torch.where(output.valid, output.scores, torch.nan).to(rollouts.device)
        return known[step]

    return torch.stack([reward_from(step + 1) - reward_from(step) for step in steps], dim=1)


def sign_agreement(credit: Tensor, gains: Tensor) -> Tensor:
    """Share of (rollout, step) pairs whose credit has the sign of what the step did; pairs without either are left out.

    Args:
        credit, gains: [B, S].

    Returns:
        Scalar; nan where nothing is left.
    """
    judged = (credit != 0) & (gains != 0) & gains.isfinite()
    return (credit.sign() == gains.sign())[judged].float().mean()
