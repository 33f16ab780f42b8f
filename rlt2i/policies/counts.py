"""Counting what a network computes and keeps, in passes over the meta device, where tensors have no storage."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlt2i.policies.attention.kernels import attend
from rlt2i.policies.attention.watch import kernel_inputs


def count_operations(run: Callable[[], Any]) -> float:
    """Arithmetic of matrix products, convolutions and attention, a multiply-add as two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Without a device, scaled_dot_product_attention falls back to explicit matrices; no real device does.

    Replaced by name, because a function mode would not reach the blocks that a checkpointed backward pass runs again.
    """
    original = functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        given = (query, key, value)
        if has_torch_function(given):  # in a watched block
            return handle_torch_function(original, given, *given, *args, **options)
        query, key, value, bias, scale = kernel_inputs(*given, *args, **options)
        return attend(query, key, value, "cpu", bias=bias, scale=scale)[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


@contextlib.contextmanager
def longest_texts(length: int) -> Iterator[None]:
    """Tells a network that asks how long the texts of its batch are, which the meta device does not know: all longest.

    Replaced by name, because a function mode would take unwatched attention off its fused kernel.

    Args:
        length: of the longest text, in tokens.
    """
    original = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        if self.is_meta and self.ndim == 1 and not self.is_floating_point():
            return [length] * len(self)
        return original(self)

    Tensor.tolist = tolist  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Tensor.tolist = original  # type: ignore[method-assign]


class PeakMemory(TorchDispatchMode):
    """Adds up the storages that are alive, from the moment it is entered; `peak` is the largest sum."""

    def __init__(self, *existing: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        tensors = [t for module in existing for t in (*module.parameters(), *module.buffers())]
        self._kept = [t.untyped_storage() for t in tensors]
        self._known: dict[int, Any] = {id(storage): storage for storage in self._kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self._known:
                self._enter(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _enter(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def leave(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, leave)
        self.live += size
