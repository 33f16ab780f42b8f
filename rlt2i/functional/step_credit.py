"""Credit per step from the trajectory itself: contributions, turning points and trees."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .advantages import group_relative_advantage
from .numerics import full_precision, rounding

Reference = Literal["remaining", "global", "final"]


def clean_similarity(clean_predictions: Tensor, x0: Tensor) -> Tensor:
    """Cosine similarity of every one-step prediction to the final latent, with the final one (1) appended.

    Args:
        clean_predictions: [B, T, C, H, W], x0_hat at the state before each step.
        x0: [B, C, H, W] final latent.

    Returns:
        [B, T + 1].
    """
    predictions, final = full_precision(clean_predictions).flatten(2), full_precision(x0).flatten(1)
    similarity = torch.cosine_similarity(predictions, final[:, None], dim=2)
    return torch.cat([similarity, similarity.new_ones(len(similarity), 1)], dim=1)


def coca_contribution(similarity: Tensor) -> Tensor:
    """CoCA's share of each step in reaching the final image (arXiv 2505.19196).

        c_t = (sim_{t+1} - sim_t) / (sim_T - sim_0)

    Args:
        similarity: [B, T + 1] from `clean_similarity`.

    Returns:
        [B, T]; every row sums to 1, and is 1/T where the first prediction is as similar as the last.
    """
    gain = full_precision(similarity).diff(dim=1)
    total = gain.sum(dim=1, keepdim=True)
    return torch.where(total != 0, gain / torch.where(total != 0, total, 1), 1 / gain.shape[1])


def coca_advantage(
    advantage: Tensor,
    contribution: Tensor,
    group_size: int | Tensor,
    *,
    alpha: float,
    eps: float = 1e-4,
    valid: Tensor | None = None,
) -> Tensor:
    """Spread an advantage over the steps by what is still to be contributed (CoCA, arXiv 2505.19196).

        A_t = A ( alpha + (1 - alpha) sum_{j >= t} c_j ),  then normalised per group and step

    Args:
        advantage: [B] group-relative advantage, already clipped.
        contribution: [B, T] from `coca_contribution`.
        group_size: G for adjacent groups, or [B] integer group ids.
        alpha: share that every step gets alike, in [0, 1].
        eps: added to the std of the second normalisation.
        valid: [B] bool.

    Returns:
        [B, T].

    Raises:
        ValueError: for an alpha outside of [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: the share that all steps get alike lies in [0, 1].")
    remaining = full_precision(contribution).flip(1).cumsum(dim=1).flip(1)
    shaped = full_precision(advantage)[:, None] * (alpha + (1 - alpha) * remaining)
    return group_relative_advantage(shaped, group_size, eps=eps, valid=valid)


class TurningPointReward(NamedTuple):
    """Step rewards of TP-GRPO and the parts they are made of, all [B, T]."""

    reward: Tensor
    gain: Tensor
    agreement: Tensor
    bonus: Tensor
    main: Tensor


def turning_points(
    ode_reward: Tensor,
    step_rewards: Tensor,
    final_reward: Tensor,
    *,
    first: bool = True,
    consistent_first: bool = True,
    consistent_later: bool = True,
    any_reversal: bool = False,
    positive_only: bool = False,
) -> Tensor:
    """Steps at which a trajectory turns towards its outcome (TP-GRPO, arXiv 2602.06422).

        d_t = R_t - R_{t-1} with R_0 = R_ode,   s_t = sign(d_t) sign(R_final - R_ode)
        t >= 2:  s_{t-1} < 0 < s_t     t = 1:  s_1 > 0     consistency:  sign(d_t) sign(R_final - R_t) > 0

    Args:
        ode_reward: [B] reward of the pure ODE image from the same noise.
        step_rewards: [B, T], column t - 1 is the reward after t stochastic steps and an ODE to the end.
        final_reward: [B] reward of the rollout.
        first: whether the first step may be a turning point.
        consistent_first: the first step is judged by the consistency test instead of by s_1 > 0.
        consistent_later: later turning points must pass the consistency test too.
        any_reversal: later turning points are all sign changes, d_{t-1} d_t < 0, towards the outcome or away
            from it.
        positive_only: later turning points only in trajectories that beat the ODE.

    Returns:
        [B, T] bool.
    """
    _, gain, trend, agreement = _trends(ode_reward, step_rewards, final_reward)
    to_come = _difference(full_precision(final_reward)[:, None], full_precision(step_rewards))
    consistent = gain.sign() * to_come.sign() > 0
    turns = (agreement[:, :-1] < 0) & (agreement[:, 1:] > 0)
    if any_reversal:
        turns = gain[:, :-1] * gain[:, 1:] < 0
    if positive_only:
        turns = turns & (trend > 0)
    if consistent_later:
        turns = turns & consistent[:, 1:]
    start = consistent[:, :1] if consistent_first else agreement[:, :1] > 0
    return torch.cat([start if first else torch.zeros_like(start), turns], dim=1)


def balance_turning_points(points: Tensor, strength: Tensor) -> Tensor:
    """Keep as many rising as falling turning points, the strongest of each (TP-GRPO, arXiv 2602.06422).

    Balancing looks at the whole tensor, so its result depends on what is batched together. If all points have
    one sign, all stay.

    Args:
        points: [B, T] bool.
        strength: [B, T] signed; points of strength 0 belong to neither side and are dropped.

    Returns:
        [B, T] bool.
    """
    rising, falling = points & (strength > 0), points & (strength < 0)
    keep = torch.minimum(rising.sum(), falling.sum())

    def strongest(side: Tensor) -> Tensor:
        order = torch.where(side, strength.abs(), -1).flatten().argsort(descending=True, stable=True)
        return side & (order.argsort().view_as(side) < keep)

    return torch.where(keep > 0, strongest(rising) | strongest(falling), points)


def turning_point_reward(
    ode_reward: Tensor,
    step_rewards: Tensor,
    final_reward: Tensor,
    points: Tensor,
    *,
    eta: float = 1.0,
    bonus: Reference = "remaining",
    replace: bool = True,
    propagate: bool = False,
) -> TurningPointReward:
    """Step rewards with a bonus at turning points (TP-GRPO, arXiv 2602.06422).

        reward_t = d_t + eta 1[turning] B_t

    Args:
        ode_reward: [B].
        step_rewards: [B, T]; see `turning_points`.
        final_reward: [B].
        points: [B, T] bool from `turning_points`, possibly balanced.
        eta: strength of the bonus.
        bonus: B_t: "remaining" R_final - R_{t-1} (published), "global" R_final - R_ode, or "final" R_final.
        replace: the bonus replaces the gain d_t where it is not 0 (published) instead of adding to it.
        propagate: a falling point (R_final < R_{t-1}) also marks all steps before it and a rising one all
            steps after it; a step gets its own R_final - R_{t-1} once for each point that marks it. `bonus`
            is not read then.

    Returns:
        TurningPointReward.

    Raises:
        ValueError: for an unknown bonus.
    """
    before, gain, trend, agreement = _trends(ode_reward, step_rewards, final_reward)
    remaining = full_precision(final_reward)[:, None] - before
    marks = points.to(gain.dtype)
    if propagate:
        falling, rising = marks * (remaining < 0), marks * (remaining > 0)
        value = (falling.flip(1).cumsum(dim=1).flip(1) + rising.cumsum(dim=1)) * remaining
    elif bonus == "remaining":
        value = marks * remaining
    elif bonus == "global":
        value = marks * trend
    elif bonus == "final":
        value = marks * full_precision(final_reward)[:, None]
    else:
        raise ValueError(f"bonus={bonus!r}: unknown bonus. Use 'remaining', 'global' or 'final'.")
    value = eta * value
    main = torch.where(value != 0, 0, gain) if replace else gain
    return TurningPointReward(reward=main + value, gain=gain, agreement=agreement, bonus=value, main=main)


def _trends(ode_reward: Tensor, step_rewards: Tensor, final_reward: Tensor) -> tuple[Tensor, ...]:
    """R_{t-1} [B, T], d [B, T], R_final - R_ode [B, 1] and s [B, T]."""
    shapes = tuple(ode_reward.shape), tuple(step_rewards.shape), tuple(final_reward.shape)
    if len(shapes[1]) != 2 or shapes[0] != shapes[2] or shapes[0] != shapes[1][:1]:
        raise ValueError(f"rewards of shapes {shapes} do not belong together. Pass [B], [B, T] and [B].")
    ode, steps, final = full_precision(ode_reward), full_precision(step_rewards), full_precision(final_reward)
    before = torch.cat([ode[:, None], steps[:, :-1]], dim=1)
    gain = _difference(steps, before)
    trend = _difference(final, ode)[:, None]
    return before, gain, trend, gain.sign() * trend.sign()


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b, and exactly 0 where it is only the rounding of numbers of their size: its sign decides."""
    difference = a - b
    return torch.where(difference.abs() <= rounding(torch.maximum(a.abs(), b.abs())), 0, difference)
