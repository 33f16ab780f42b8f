"""Diffusion-DPO for flows: preferences between two images as a logistic loss on flow-matching errors."""

import torch.nn.functional as F
from torch import Tensor

from .matching import credit_map
from .numerics import Scalar, check_same_shape, full_precision


def dpo_logits(
    error_winner: Tensor,
    error_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    *,
    beta: float = 100.0,
    weight_winner: Scalar = 1.0,
    weight_loser: Scalar = 1.0,
) -> Tensor:
    """Log-odds that the winner is preferred (Diffusion-DPO, arXiv 2311.12908, in Flow-GRPO's form for flows).

        z = -beta/2 mean_p [ w+_p (e_w - e_w^ref)_p - w-_p (e_l - e_l^ref)_p ]

    Spatial weights belong inside the logit: outside they would only rescale a pair's loss. Errors are *means*
    over channels and space, hence beta = 100; Diffusion-DPO's 2000 to 5000 has a factor T absorbed.

    Args:
        error_winner: [B, H, W] flow-matching error of the policy on the winner; gradients flow.
        error_loser: [B, H, W] on the loser, same noise and sigma.
        reference_winner: [B, H, W] of the frozen reference on the winner.
        reference_loser: [B, H, W] of the frozen reference on the loser.
        beta: strength of the implicit KL.
        weight_winner: mean-one weights of the winner; float, [B], or broadcastable to [B, H, W].
        weight_loser: mean-one weights of the loser.

    Returns:
        [B].

    Raises:
        ValueError: for a beta that is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta}: the preference would not depend on the policy. Use a positive beta.")
    check_same_shape(
        error_winner=error_winner,
        error_loser=error_loser,
        reference_winner=reference_winner,
        reference_loser=reference_loser,
    )
    winner = full_precision(error_winner) - full_precision(reference_winner.detach())
    loser = full_precision(error_loser) - full_precision(reference_loser.detach())
    difference = credit_map(weight_winner, winner, name="weight_winner") * winner
    difference = difference - credit_map(weight_loser, loser, name="weight_loser") * loser
    return -0.5 * beta * difference.mean(dim=(1, 2))


def dpo_loss(logits: Tensor) -> Tensor:
    """Logistic loss of preferences, L = -log sigmoid(z) (DPO, arXiv 2305.18290).

    Args:
        logits: [B] from `dpo_logits`.

    Returns:
        [B]; log 2 where policy and reference agree.
    """
    return -F.logsigmoid(full_precision(logits))
