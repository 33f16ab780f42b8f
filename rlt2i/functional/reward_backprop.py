"""Learning from the gradient of a reward: the chain rule through decoder, denoising steps and network.

Along x' = x + v_t dt_t a reward has d r / d theta = sum_t (d v_t / d theta)^T g_t, where g_t = dt_t d r / d x'
reaches the velocity of step t. Credit weights g_t place by place; nothing here is a mean over places.
"""

from typing import Literal

from torch import Tensor

from .numerics import check_broadcasts_into, check_same_shape

Saliency = Literal["gradient", "gradient_times_input"]


def scale_gradient(x: Tensor, weight: Tensor) -> Tensor:
    """x itself, whose gradient is multiplied by a weight.

    Args:
        x: any shape.
        weight: broadcastable to `x`; a constant. 0 is a detached x.

    Returns:
        The values of `x`, bit for bit.
    """
    check_broadcasts_into(x, weight=weight)
    fixed = x.detach()
    return fixed + weight.detach() * (x - fixed)


def first_order(values: Tensor, gradient: Tensor, latents: Tensor) -> Tensor:
    """A function that is known by its values and its gradient here, as something to run backward on.

        f(z) = f(z_0) + < grad f(z_0), z - z_0 >  at z = z_0

    Args:
        values: [N], f at the latents; a constant.
        gradient: [N, C, H, W], of each value with respect to its latents; a constant.
        latents: [N, C, H, W]; gradients flow into them.

    Returns:
        [N], equal to `values`.
    """
    check_same_shape(gradient=gradient, latents=latents)
    return values.detach() + (gradient.detach() * (latents - latents.detach())).sum(dim=(1, 2, 3))


def refl_loss(reward: Tensor, *, margin: float) -> Tensor:
    """ReFL's hinge, max(margin - r, 0) (ImageReward, arXiv 2304.05977): a reward above the margin teaches nothing.

    Args:
        reward: [N]; gradients flow.
        margin: in the unit of the reward; 2 for ImageReward.

    Returns:
        [N].
    """
    return (margin - reward).clamp(min=0)


def last_steps(unmasked: Tensor, depth: Tensor | int) -> Tensor:
    """The last steps that a rollout learns from, masked ones not counted (DRaFT-K, arXiv 2309.17400).

    Args:
        unmasked: [B, T] bool.
        depth: K, the same for all rollouts or [B] long.

    Returns:
        [B, T] bool, at most K of each row.
    """
    from_the_end = unmasked.long().flip(1).cumsum(dim=1).flip(1)
    limit = depth[:, None] if isinstance(depth, Tensor) else depth
    return unmasked & (from_the_end <= limit)


def random_depth(uniform: Tensor, num_steps: int) -> Tensor:
    """Randomised truncation, K ~ Uniform{1, ..., num_steps} (AlignProp, arXiv 2310.03739).

    Args:
        uniform: [B] draws in [0, 1).
        num_steps: the most steps.

    Returns:
        [B] long.
    """
    return 1 + (uniform * num_steps).long()


def gradient_saliency(gradient: Tensor, latents: Tensor, *, form: Saliency = "gradient") -> Tensor:
    """How much a reward depends on each place (arXiv 1312.6034).

        "gradient"               S_p = sum_c | d R / d z_cp |
        "gradient_times_input"   S_p = | sum_c z_cp d R / d z_cp |,  the first-order change when the place goes to 0

    Args:
        gradient: [N, C, H, W].
        latents: [N, C, H, W] where it was taken.
        form: which of the two.

    Returns:
        [N, H, W], non-negative.

    Raises:
        ValueError: for an unknown form.
    """
    check_same_shape(gradient=gradient, latents=latents)
    if form == "gradient":
        return gradient.abs().sum(dim=1)
    if form == "gradient_times_input":
        return (gradient * latents).sum(dim=1).abs()
    raise ValueError(f"form={form!r}: unknown saliency. Use 'gradient' or 'gradient_times_input'.")
