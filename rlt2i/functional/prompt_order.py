"""Which prompts each rank samples: every prompt k times per batch, scattered over the ranks."""

import torch


def k_repeat_indices(
    dataset_size: int, *, batch_size: int, repeats: int, num_ranks: int, seed: int
) -> tuple[tuple[int, ...], ...]:
    """Flow-GRPO's distributed sampler for one batch, as a function of its seed.

    m = num_ranks * batch_size / repeats distinct prompts are drawn, each repeated `repeats` times, shuffled,
    and cut into one slice per rank. Flow-GRPO's seed is its seed plus the epoch counter.

    Args:
        dataset_size: number of prompts.
        batch_size: samples per rank.
        repeats: k, rollouts per prompt.
        num_ranks: number of ranks.
        seed: of this batch; all ranks must pass the same.

    Returns:
        For each rank, `batch_size` prompt indices.
    """
    total = num_ranks * batch_size
    if repeats < 1 or total % repeats:
        raise ValueError(
            f"{num_ranks} ranks with {batch_size} samples cannot hold whole groups of {repeats}. "
            "Choose a batch size so that num_ranks * batch_size is a multiple of the group size."
        )
    distinct = total // repeats
    if distinct > dataset_size:
        raise ValueError(f"{distinct} distinct prompts per batch, but the data set has only {dataset_size}.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(dataset_size, generator=generator)[:distinct].repeat_interleave(repeats)
    shuffled = chosen[torch.randperm(total, generator=generator)]
    return tuple(tuple(row.tolist()) for row in shuffled.view(num_ranks, batch_size))
