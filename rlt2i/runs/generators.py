"""The global generators of torch, numpy and Python: parts of somebody else's may draw from them.

Nothing of this package does. They are seeded from (seed, rank), saved and restored, so that such parts neither differ
between two runs of one seed nor between a run and its continuation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from rlt2i.seeds import derive_seed


def seed_global_generators(*key: int | str) -> None:
    """Seed all of them from a key, such as ("global", seed, rank)."""
    seed = derive_seed(*key)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def global_generators() -> dict[str, Tensor]:
    """All that they remember, as tensors: "torch", "cuda" where there is one, "numpy", "python"."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, rest = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, keys), int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(gauss)], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if rest is None else [rest], dtype=torch.float64),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_global_generators(states: Mapping[str, Tensor]) -> None:
    """The inverse of `global_generators`; generators whose state is not among them stay as they are."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "numpy" in states:
        *keys, position, has_gauss = states["numpy"].tolist()
        gauss = float(states["numpy_gauss"][0])
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    if "python" in states:
        version, *words = states["python"].tolist()
        rest = states["python_gauss"].tolist()
        random.setstate((version, tuple(words), rest[0] if rest else None))


@contextmanager
def undisturbed_generators() -> Iterator[None]:
    """Whatever is drawn from the global generators in the block, they go on as if it had not been."""
    states = global_generators()
    try:
        yield
    finally:
        restore_global_generators(states)
