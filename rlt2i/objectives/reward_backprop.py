"""What objectives that follow the gradient of a reward share."""

from __future__ import annotations

import torch
from torch import Tensor

from rlt2i.functional.reward_backprop import first_order, scale_gradient
from rlt2i.functional.transfer import on_host
from rlt2i.interfaces import UpdateContext
from rlt2i.objectives.reduction import on_grid
from rlt2i.types import Experience, StepBatch


def scale_credit_gradient(velocity: Tensor, states: StepBatch) -> Tensor:
    """[N, C, H, W]: the velocity itself, whose gradient is multiplied by the credit's weight, and by 0 where masked.

    The advantage plays no part: the reward says itself which way to go. A reward is no mean over places, so a mask has
    no denominator to leave; it does what a weight of 0 does.
    """
    grid = (velocity.shape[2], velocity.shape[3])
    kept = on_grid(states.mask.float(), grid) > 0
    return scale_gradient(velocity, (on_grid(states.weight, grid) * kept)[:, None])


def rewarded(
    latents: Tensor, experience: Experience, rollouts: Tensor, context: UpdateContext
) -> tuple[Tensor, dict[str, Tensor]]:
    """Judge N decoded latents.

    Args:
        latents: [N, C, H, W]; gradients flow.
        rollouts: [N] long, whose prompts they are judged under.

    Returns:
        [N] rewards with a gradient, and what is worth logging about them.
    """
    judged = context.reward_gradient(latents.detach(), experience.prompts.take(on_host(rollouts).tolist()))
    metrics = {
        "backprop/reward": judged.scores,
        "backprop/gradient": torch.linalg.vector_norm(judged.gradient, dim=(1, 2, 3)),
    }
    return first_order(judged.scores, judged.gradient, latents), metrics
