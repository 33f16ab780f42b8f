"""The gradient of a reward with respect to the latents that it judges, by way of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from rlt2i.functional.transfer import to_device
from rlt2i.interfaces import Policy, Reward, RewardGradient
from rlt2i.types import Prompts


def reward_gradient(
    policy: Policy, reward: Reward, latents: Tensor, prompts: Prompts, *, rollout_batch_size: int
) -> RewardGradient:
    """Scores of decoded latents and the gradient of each score with respect to its latents, both detached.

    The chain rule needs nothing else of decoder and reward, so what they keep for it lives for one chunk only, and
    never beside the activations of the network that made the latents.

    Args:
        latents: [N, C, H, W].
        prompts: N of them, in groups of one.
        rollout_batch_size: decoded and judged together.

    Raises:
        ValueError: when the scores do not depend on the images by way of a gradient.
    """
    gradients = []
    for rows in torch.arange(len(latents)).split(rollout_batch_size):
        requested = prompts.take(rows.tolist())
        with torch.enable_grad():
            leaf = latents[to_device(rows, latents.device)].detach().requires_grad_()
            scores = reward.score_tensor(policy.decode(leaf), requested.texts, requested.metadata)
        if not scores.requires_grad:
            raise ValueError(
                f"{type(reward).__name__}.score_tensor returned scores without a gradient. Do not detach the images in "
                "it, or leave 'gradient' out of what the reward offers."
            )
        # Not of scores.sum(): credit is assigned without gradients, where a sum would have none.
        (gradient,) = torch.autograd.grad(scores, leaf, torch.ones_like(scores))
        gradients.append(RewardGradient(scores=scores.detach().float().to(latents.device), gradient=gradient))
    return RewardGradient(
        scores=torch.cat([chunk.scores for chunk in gradients]),
        gradient=torch.cat([chunk.gradient for chunk in gradients]),
    )
