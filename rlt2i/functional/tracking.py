"""Running reward statistics per prompt, as a pure function of the history."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import full_precision

History = Mapping[str, tuple[float, ...]]


class TrackedAdvantage(NamedTuple):
    """Attributes: advantage [B]; history, to be passed to the next call."""

    advantage: Tensor
    history: dict[str, tuple[float, ...]]


def tracked_advantage(
    rewards: Tensor,
    prompts: Sequence[str],
    history: History,
    *,
    buffer_size: int = 16,
    min_count: int = 16,
    eps: float = 1e-6,
) -> TrackedAdvantage:
    """DDPO's advantage from each prompt's recent rewards (arXiv 2305.13301), for batches without groups.

        A_i = (r_i - mean) / (std + eps)

    over the last `buffer_size` rewards of the prompt, including this batch; prompts seen less than
    `min_count` times use the mean and std of this batch. Population std.

    Args:
        rewards: [B].
        prompts: B texts.
        history: past rewards per prompt, oldest first; {} at the start.
        buffer_size: how many rewards of a prompt to remember.
        min_count: how many rewards make a prompt's own statistics.
        eps: added to the std.

    Returns:
        TrackedAdvantage.
    """
    if len(prompts) != len(rewards):
        raise ValueError(f"{len(prompts)} prompts for {len(rewards)} rewards: pass one prompt per reward.")
    if buffer_size < 1:
        raise ValueError(f"buffer_size={buffer_size}: a prompt needs room for at least one reward.")
    rewards = full_precision(rewards)
    updated = dict(history)
    for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
        updated[prompt] = (*updated.get(prompt, ()), reward)[-buffer_size:]
    known = {prompt: rewards.new_tensor(updated[prompt]) for prompt in set(prompts)}
    pools = [known[prompt] if len(known[prompt]) >= min_count else rewards for prompt in prompts]
    mean = torch.stack([pool.mean() for pool in pools])
    std = torch.stack([pool.std(correction=0) for pool in pools])
    return TrackedAdvantage((rewards - mean) / (std + eps), updated)
