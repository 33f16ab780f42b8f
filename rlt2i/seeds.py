"""Randomness as a function of names, so results do not depend on batch size, order or world size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

_MASK = (1 << 63) - 1


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of integers and strings (BLAKE2b, stable across machines and versions)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MASK


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded from `parts`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@attrs.define
class RolloutNoise:
    """The Gaussian draws of B rollouts, one private generator each.

    A row's numbers depend on its own seed alone: chunking or reordering the batch, or spreading it over processes,
    changes nothing. Draws are made on the CPU so that they are the same on every device.

    Args:
        initial_seeds: B seeds of the initial latents; equal seeds share their initial noise.
        step_seeds: B seeds of the noise of the stochastic steps.
        device: where the draws are needed.
    """

    initial_seeds: Sequence[int]
    step_seeds: Sequence[int]
    device: torch.device = attrs.field(default=torch.device("cpu"), converter=torch.device)
    _steps: list[torch.Generator] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._steps = [torch.Generator().manual_seed(s) for s in self.step_seeds]

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        """[B, *shape] float32 standard normal initial latents."""
        draws = {s: torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in set(self.initial_seeds)}
        return torch.stack([draws[s] for s in self.initial_seeds]).to(self.device)

    def step(self, shape: tuple[int, ...]) -> Tensor:
        """[B, *shape] float32 standard normal noise of the next stochastic step."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._steps]).to(self.device)

    def __len__(self) -> int:
        return len(self.step_seeds)


def standard_normal(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """[len(seeds), *shape] standard normal, each row a function of its own seed."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows).to(device) if rows else torch.empty(0, *shape, device=device)


def uniform(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """[len(seeds), *shape] uniform in [0, 1), each row a function of its own seed."""
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows).to(device) if rows else torch.empty(0, *shape, device=device)
