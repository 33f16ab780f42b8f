"""Which rollouts of a batch have their allocation maps kept, and what the policy foresaw in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlt2i.engine import Collected, decode
from rlt2i.functional.transitions import clean_prediction
from rlt2i.interfaces import Policy


@torch.no_grad()
def map_samples(collected: Collected, policy: Policy, *, shown: int) -> dict[str, Any]:
    """The allocation maps of the best and the worst rollouts of a batch, with the clean prediction of each step.

    Args:
        shown: rollouts to keep, half of them good and half bad, of different prompts where possible.

    Returns:
        The arguments of `runs.artifacts.write_maps`.
    """
    experience = collected.experience
    order = experience.rewards.final.argsort(descending=True).tolist()
    group_size = collected.prompts.group_size
    chosen = _one_per_group(order, group_size, shown // 2) + _one_per_group(order[::-1], group_size, shown // 2)
    rows = torch.tensor(chosen, device=experience.trajectory.latents.device)
    steps = experience.trajectory.num_steps
    clean = []
    for step in range(steps):
        pairs = experience.step_batch(rows, torch.full_like(rows, step))
        velocity = policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning)
        latents = clean_prediction(pairs.latents, velocity, pairs.sigma)
        clean.append(decode(policy, latents, rollout_batch_size=len(chosen)).cpu())
    groups = [i // group_size for i in chosen]
    return {
        "weights": experience.credit.take(rows).weight.expand(len(chosen), steps, -1, -1).float().cpu(),
        "clean": torch.stack(clean, dim=1),
        "final": collected.images[rows.to(collected.images.device)].cpu(),
        "sigmas": experience.trajectory.sigmas.cpu(),
        "prompts": [collected.prompts.texts[g] for g in groups],
        "core": [list(collected.prompts.core[g]) for g in groups],
        "scores": [float(experience.rewards.final[i]) for i in chosen],
    }


def _one_per_group(order: Sequence[int], group_size: int, count: int) -> list[int]:
    """The first `count` rollouts in `order` of distinct groups, topped up with repeats where groups are few."""
    chosen: list[int] = []
    for rollout in order:
        if len(chosen) < count and all(rollout // group_size != other // group_size for other in chosen):
            chosen.append(rollout)
    return chosen + [r for r in order if r not in chosen][: count - len(chosen)]
