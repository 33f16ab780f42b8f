"""Products of bfloat16 tensors on a CPU that has no instructions for them.

Without AVX512-BF16 or AMX, PyTorch multiplies bfloat16 matrices by a scalar loop, ten to twenty times slower than
float32 ones; most of a rehearsal's time went there. Here the factors are widened to float32, which is exact, and the
result is rounded to bfloat16 once: what those instructions compute too, up to the order of summation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
"""Operators of ATen that carry nearly all the work of a network and of its gradient."""


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextlib.contextmanager
def fast_bfloat16() -> Iterator[bool]:
    """Widen the factors of bfloat16 products on the CPU while this lasts, in every thread of the process.

    Operators that a compiled graph calls by their `out` variants are not reached.

    Yields:
        Whether it does; not where the CPU has instructions of its own.
    """
    if cpu_multiplies_bfloat16():
        yield False
        return
    library = torch.library.Library("aten", "IMPL")
    try:
        for name in PRODUCTS:
            operator = getattr(torch.ops.aten, name).default
            library.impl(operator, _widened(operator), "CPU", with_keyset=True)
        yield True
    finally:
        library._destroy()


def _widened(operator: Any) -> Callable[..., Any]:
    kernel = torch.library.get_kernel(operator, "CPU")

    def product(keys: torch.DispatchKeySet, *arguments: Any, **options: Any) -> Any:
        if arguments[0].dtype is not torch.bfloat16:
            return kernel.call_boxed(keys, *arguments, **options)
        wide = [each.float() if isinstance(each, torch.Tensor) else each for each in arguments]
        result = kernel.call_boxed(keys, *wide, **options)
        if isinstance(result, tuple):
            return tuple(None if each is None else each.bfloat16() for each in result)
        return result.bfloat16()

    return product
