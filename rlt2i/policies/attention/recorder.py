"""The recorder of one pass: attention is reduced to concept maps block by block, as it is computed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from rlt2i.captures import parse_attention_name, select_blocks
from rlt2i.policies.attention.maps import MAPS, Where


@attrs.define(eq=False)
class Recorder:
    """Reduces attention to concept maps during one pass of the network, block by block in order.

    It counts the blocks itself: were each block told its index, the compiler would need a graph for every one of them.

    Args:
        num_blocks: watched blocks of the network.
        wanted: capture name -> (direction, block indices).
        where: the image and the words are.
    """

    num_blocks: int
    wanted: Mapping[str, tuple[str, tuple[int, ...]]]
    where: Where
    _sums: dict[str, Tensor] = attrs.field(factory=dict, init=False)
    _seen: int = attrs.field(default=0, init=False)

    @torch.no_grad()
    def record(self, query: Tensor, key: Tensor, lse: Tensor, bias: Tensor | None, scale: float | None) -> None:
        """Add the next block's attention to every map that asks for it; a direction is computed once."""
        if self.where.keys not in (None, key.shape[2]):
            return
        block, self._seen = self._seen, self._seen + 1
        names = [name for name, (_, blocks) in self.wanted.items() if block in blocks]
        for direction in {self.wanted[name][0] for name in names}:
            reduced = MAPS[direction](query, key, lse, self.where, bias=bias, scale=scale)  # type: ignore[index]
            concept_map = _on_grid(reduced, self.where.grid)
            for name in names:
                if self.wanted[name][0] == direction:
                    self._sums[name] = self._sums[name] + concept_map if name in self._sums else concept_map

    def captures(self) -> dict[str, Tensor]:
        """name -> [N, K, h, w] float32, the mean over the blocks."""
        assert self._seen == self.num_blocks, f"{self._seen} of {self.num_blocks} blocks reported"
        return {name: (self._sums[name] / len(blocks)).float() for name, (_, blocks) in self.wanted.items()}


def _on_grid(reduced: Tensor, grid: tuple[int, int]) -> Tensor:
    """[N, K, S] -> [N, K, h, w]; a UNet attends on several grids: finer ones are averaged, coarser ones repeated."""
    ratio = (reduced.shape[-1] / (grid[0] * grid[1])) ** 0.5
    own = (round(grid[0] * ratio), round(grid[1] * ratio))
    reduced = reduced.unflatten(-1, own)
    return reduced if own == grid else adaptive_avg_pool2d(reduced, grid)


_active = threading.local()


@contextlib.contextmanager
def recording(names: frozenset[str], *, num_blocks: int, where: Where) -> Iterator[Recorder]:
    """Within this context every watched block of this thread reports to the recorder."""
    parsed = {name: parse_attention_name(name) for name in sorted(names)}
    wanted = {name: (direction, select_blocks(blocks, num_blocks)) for name, (direction, blocks) in parsed.items()}
    recorder = Recorder(num_blocks, wanted, where)
    _active.recorder = recorder
    try:
        yield recorder
    finally:
        _active.recorder = None


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Within this context blocks report to nobody: for a pass in the middle of another one's recording."""
    recorder = getattr(_active, "recorder", None)
    _active.recorder = None
    try:
        yield
    finally:
        _active.recorder = recorder


def report(query: Tensor, key: Tensor, lse: Tensor, bias: Tensor | None, scale: float | None) -> None:
    """What a watched block tells whoever is recording, if anybody is."""
    recorder: Recorder | None = getattr(_active, "recorder", None)
    if recorder is not None:
        recorder.record(query, key, lse, bias, scale)
