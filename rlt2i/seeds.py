"""Randomness as a function of names, so draws do not depend on batch size, order or world size."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from rlt2i.functional.transfer import to_device

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
    changes nothing. Draws are made on the CPU so that they are the same on every device, in a thread of their own while
    the step before is computed, and travel to the device without anybody waiting for them.

    Args:
        initial_seeds: B seeds of the initial latents; equal seeds share their initial noise.
        step_seeds: B seeds of the noise of the stochastic steps.
        device: where the draws are needed.
    """

    initial_seeds: Sequence[int]
    step_seeds: Sequence[int]
    device: torch.device = attrs.field(default=torch.device("cpu"), converter=torch.device)
    _steps: list[torch.Generator] = attrs.field(init=False)
    _ahead: _Ahead | None = attrs.field(default=None, init=False)
    _left: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self._steps = [torch.Generator().manual_seed(s) for s in self.step_seeds]

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        """[B, *shape] float32 standard normal initial latents."""
        draws = {s: torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in set(self.initial_seeds)}
        return to_device(torch.stack([draws[s] for s in self.initial_seeds]), self.device)

    def draw_ahead(self, shape: tuple[int, ...], count: int) -> None:
        """Draw the noise of the next `count` stochastic steps before it is asked for, one step ahead."""
        assert self._ahead is None, "the noise of these steps is being drawn"
        self._left = count
        self._begin(shape)

    def step(self, shape: tuple[int, ...], rows: Tensor | None = None) -> Tensor:
        """[B, *shape] float32 standard normal noise of the next stochastic step.

        Args:
            rows: [B] long on the CPU, whose noise each rollout takes; its own by default.
        """
        drawn = self._draw(shape) if self._ahead is None else self._ahead.result()
        self._begin(shape)
        return to_device(drawn if rows is None else drawn[rows], self.device)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in self._steps])

    def _begin(self, shape: tuple[int, ...]) -> None:
        self._ahead = _Ahead(self, shape) if self._left > 0 else None
        self._left -= 1

    def __len__(self) -> int:
        return len(self.step_seeds)


class _Ahead(threading.Thread):
    """One draw in the background, into memory that the device can read without the host."""

    def __init__(self, noise: RolloutNoise, shape: tuple[int, ...]) -> None:
        super().__init__(daemon=True, name="noise")
        self._noise, self._shape = noise, shape
        self._drawn: Tensor | BaseException = RuntimeError("not drawn yet")
        self.start()

    def run(self) -> None:
        try:
            drawn = self._noise._draw(self._shape)
            self._drawn = drawn.pin_memory() if self._noise.device.type == "cuda" else drawn
        except BaseException as error:
            self._drawn = error

    def result(self) -> Tensor:
        self.join()
        if isinstance(self._drawn, BaseException):
            raise self._drawn
        return self._drawn


def standard_normal(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """[len(seeds), *shape] standard normal, each row a function of its own seed."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return to_device(torch.stack(rows), device) if rows else torch.empty(0, *shape, device=device)


def uniform(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """[len(seeds), *shape] uniform in [0, 1), each row a function of its own seed."""
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return to_device(torch.stack(rows), device) if rows else torch.empty(0, *shape, device=device)
