"""Rollouts of many prompts: encode once, then sample in chunks that fit into memory."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from rlt2i.interfaces import Policy, RolloutRequest, Sampler
from rlt2i.seeds import RolloutNoise, derive_seed
from rlt2i.types import Conditioning, ImageSize, Prompts, Trajectory


def rollout_keys(prompts: Prompts, seed: int) -> list[tuple[int, str, int, int]]:
    """(seed, prompt, draw, index): the identity of each rollout, from which all its randomness follows."""
    named = zip(prompts.texts, prompts.draws, strict=True)
    return [(seed, text, draw, index) for text, draw in named for index in range(prompts.group_size)]


def chunk_size(sampler: Sampler, group_size: int, rollout_batch_size: int) -> int:
    """Rollouts per forward pass: as many as may be, in whole groups where the sampler asks for them.

    Raises:
        ValueError: when not even one group fits.
    """
    if not sampler.whole_groups:
        return rollout_batch_size
    if group_size > rollout_batch_size:
        raise ValueError(
            f"{type(sampler).__name__} rolls a group out in one piece, and a group of {group_size} does not fit into "
            f"rollout_batch_size={rollout_batch_size}. Use rollout_batch_size >= {group_size}, or smaller groups."
        )
    return rollout_batch_size // group_size * group_size


@torch.no_grad()
def rollout(
    policy: Policy,
    sampler: Sampler,
    prompts: Prompts,
    *,
    seed: int,
    image_size: ImageSize,
    rollout_batch_size: int,
    captures: frozenset[str] = frozenset(),
    share_initial_noise: bool = False,
    iteration: int = 0,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda count: None,
    finished: Callable[[range, Trajectory], None] | None = None,
) -> Trajectory:
    """Trajectories of P x G rollouts; all draws are functions of (seed, prompt, draw, index) alone, not of the chunks.

    The networks may round otherwise in chunks of another size: equal to the last bits in float32, in bfloat16 not.

    Args:
        share_initial_noise: start the rollouts of a group from the same noise.
        iteration: number of the rollout batch, for samplers whose window slides.
        advance: called with the number of rollouts that have been finished.
        finished: called with the rows of each chunk and the chunk itself, before the next one is begun.
    """
    device = torch.device(device)
    conditioning = policy.encode(prompts)
    keys, metadata = rollout_keys(prompts, seed), prompts.per_rollout(prompts.metadata)
    size = chunk_size(sampler, prompts.group_size, rollout_batch_size)
    chunks = []
    for start in range(0, len(keys), size):
        rows = range(start, min(start + size, len(keys)))
        noise = RolloutNoise(
            [derive_seed("initial", *(keys[i][:3] if share_initial_noise else keys[i])) for i in rows],
            [derive_seed("steps", *keys[i]) for i in rows],
            device,
        )
        chunks.append(
            sampler.rollout(
                policy,
                conditioning.take(torch.tensor(list(rows))),
                RolloutRequest(
                    noise=noise,
                    captures=captures,
                    image_size=image_size,
                    group_size=prompts.group_size if sampler.whole_groups else 1,
                    iteration=iteration,
                    metadata=[metadata[i] for i in rows],
                ),
            )
        )
        if finished is not None:
            finished(rows, chunks[-1])
        advance(len(rows))
    noisy = bool(sampler.stochastic_steps(iteration))
    return _concatenate(chunks, conditioning=conditioning, group_size=prompts.group_size, noisy=noisy)


def _concatenate(chunks: list[Trajectory], *, conditioning: Conditioning, group_size: int, noisy: bool) -> Trajectory:
    """One trajectory from chunks that differ only in their rows."""
    first = chunks[0]
    return attrs.evolve(
        first,
        latents=torch.cat([c.latents for c in chunks]),
        log_probs=torch.cat([c.log_probs for c in chunks]) if noisy else _no_log_probs(chunks),
        captures={name: torch.cat([c.captures[name] for c in chunks]) for name in first.captures},
        noisy=torch.cat([c.noisy for c in chunks]),
        conditioning=conditioning,
        group_size=group_size,
    )


def _no_log_probs(chunks: list[Trajectory]) -> Tensor:
    """A broadcast zero: deterministic rollouts need no memory for log-probabilities."""
    rows = sum(c.num_rollouts for c in chunks)
    return chunks[0].log_probs.new_zeros(()).expand(rows, *chunks[0].log_probs.shape[1:])
