"""Which groups of an iteration have which image size, where a recipe names several."""

from __future__ import annotations

import torch

from rlt2i.recipes.train_config import TrainConfig
from rlt2i.seeds import generator
from rlt2i.types import ImageSize


def groups_by_size(train: TrainConfig, *, iteration: int) -> dict[ImageSize, list[int]]:
    """Image size -> positions of its groups in the iteration's part of the prompt stream, increasing.

    Every entry of `train.sizes` gets equally many of the P groups, up to one; which ones is drawn by the seed for each
    iteration, and does not depend on the number of processes. A size that is named twice gets twice as many.
    """
    count, sizes = train.prompts_per_iteration, train.sizes
    if not sizes:
        return {train.image_size: list(range(count))}
    draw = generator("sizes", train.seed, iteration)
    first = torch.randperm(len(sizes), generator=draw).tolist()
    dealt: dict[ImageSize, list[int]] = {size: [] for size in sizes}
    for turn, position in enumerate(torch.randperm(count, generator=draw).tolist()):
        dealt[sizes[first[turn % len(sizes)]]].append(position)
    return {size: sorted(positions) for size, positions in dealt.items() if positions}
