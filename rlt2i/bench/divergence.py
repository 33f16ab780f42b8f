"""How far training moved the policy, in nats: the exact KL divergence of its sampling path from the base's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rlt2i.functional.gaussian import kl_map
from rlt2i.interfaces import Policy
from rlt2i.parameter_sets import ParameterSets
from rlt2i.samplers.chunked import rollout
from rlt2i.samplers.kernels import FlowSDE
from rlt2i.samplers.sde import SDE
from rlt2i.tasks.base import TaskPrompt, as_prompts
from rlt2i.types import ImageSize

NOISE_LEVEL = 0.7
"""Of Flow-SDE. One kernel for all arms, whatever they were trained with, so that their nats can be compared."""
IMAGES = 48
"""Held-out prompts of which a path is sampled."""


@torch.no_grad()
def path_divergence(
    policy: Policy,
    sets: ParameterSets,
    prompts: Sequence[TaskPrompt],
    *,
    num_steps: int,
    seed: int,
    image_size: ImageSize,
    rollout_batch_size: int,
) -> Tensor:
    """KL(path of the policy || path of the base), by place of the latents.

    Both walk the same Flow-SDE, so the divergence of a path is the sum over steps of that of two Gaussians of equal
    width, |mean - mean_base|^2 / (2 std^2), in states that the policy itself visits. The last step is left out: its
    standard deviation is next to nothing.

    Args:
        policy: with the trained weights in force.
        sets: "reference" holds those of the base.
        prompts: N of them, a path each.

    Returns:
        [N, H, W] nats: summed over steps and channels, so that the sum over places is the divergence of an image.
    """
    trajectory = rollout(
        policy,
        SDE(num_steps=num_steps, kernel=FlowSDE(noise_level=NOISE_LEVEL)),
        as_prompts(list(prompts), group_size=1),
        seed=seed,
        image_size=image_size,
        rollout_batch_size=rollout_batch_size,
        device=next(iter(policy.trainable_parameters().values())).device,
    )
    parts = []
    for rows in torch.arange(trajectory.num_rollouts, device=trajectory.latents.device).split(rollout_batch_size):
        part = trajectory.take(rows)
        channels = part.latents.shape[2]
        total = torch.zeros_like(part.latents[:, 0, 0])
        for step in part.stochastic.nonzero()[:, 0].tolist():
            latents = part.latents[:, step]
            sigma, after = (part.sigmas[i].expand(len(rows)) for i in (step, step + 1))
            now = part.transition(latents, policy.velocity(latents, sigma, part.conditioning), sigma, after)
            with sets.use("reference"):
                base = part.transition(latents, policy.velocity(latents, sigma, part.conditioning), sigma, after)
            total += channels * kl_map(now.mean, base.mean, now.std)
        parts.append(total)
    return torch.cat(parts).cpu()


def inside_and_outside(nats: Tensor, inside: Tensor | None) -> dict[str, float]:
    """Mean nats an image, and apart by whether the reward looks there.

    Args:
        nats: [N, h, w].
        inside: [N, H, W] in [0, 1], or None where the reward does not say.

    Returns:
        "kl/path", and with regions "kl/inside" and "kl/outside", which add up to it.
    """
    metrics = {"kl/path": float(nats.sum(dim=(1, 2)).mean())}
    if inside is not None:
        area = interpolate(inside[:, None].float(), size=tuple(nats.shape[-2:]), mode="area")[:, 0]
        metrics["kl/inside"] = float((nats * area).sum(dim=(1, 2)).mean())
        metrics["kl/outside"] = float((nats * (1 - area)).sum(dim=(1, 2)).mean())
    return metrics
