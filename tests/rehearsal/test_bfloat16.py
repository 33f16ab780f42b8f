"""Widened bfloat16 products: PyTorch's numbers up to a rounding, in gradients and threads too, and gone afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from rlt2i.rehearsal import bfloat16
from rlt2i.rehearsal.bfloat16 import cpu_multiplies_bfloat16, fast_bfloat16


def tensors(*sizes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


CASES = {
    "linear": (lambda x, w, b: F.linear(x, w, b), ((5, 16), (8, 16), (8,))),
    "matmul": (lambda x, y: x @ y, ((5, 16), (16, 8))),
    "bmm": (lambda x, y: x @ y, ((3, 5, 16), (3, 16, 8))),
    "baddbmm": (lambda x, y, z: torch.baddbmm(x, y, z, beta=0.5, alpha=2.0), ((3, 5, 8), (3, 5, 16), (3, 16, 8))),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1), ((2, 4, 8, 8), (6, 4, 3, 3), (6,))),
    "conv2d without bias": (lambda x, w: F.conv2d(x, w, stride=2), ((2, 4, 8, 8), (6, 4, 3, 3))),
    "channels last": (
        lambda x, w: F.conv2d(x.to(memory_format=torch.channels_last), w, padding=1),
        ((2, 4, 8, 8), (6, 4, 3, 3)),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_and_gradients_are_those_of_pytorch_up_to_one_rounding(case, dtype):
    work, sizes = CASES[case]

    def results() -> list[torch.Tensor]:
        inputs = tensors(*sizes, dtype=dtype)
        result = work(*inputs)
        gradients = torch.autograd.grad((result.float() ** 2).sum(), inputs)
        return [result.detach(), *gradients]

    plain = results()
    with fast_bfloat16():
        fast = results()
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert ours.stride() == theirs.stride()
        if dtype == torch.float32:
            assert torch.equal(ours, theirs)
        else:  # two roundings of 2^-9 each may fall apart, in the gradient after those of the result
            torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6 * float(theirs.abs().max()))


def test_other_threads_multiply_the_same_way_and_nothing_is_left_behind(monkeypatch):
    monkeypatch.setattr(bfloat16, "cpu_multiplies_bfloat16", lambda: False)
    widths = []
    kernel = bfloat16._widened

    def counting(operator):
        product = kernel(operator)

        def counted(keys, *arguments, **options):
            widths.append(operator)
            return product(keys, *arguments, **options)

        return counted

    monkeypatch.setattr(bfloat16, "_widened", counting)
    x, y = tensors((4, 4), (4, 4))
    with fast_bfloat16() as widened:
        assert widened
        thread = threading.Thread(target=lambda: x @ y)
        thread.start()
        thread.join()
        assert len(widths) == 1
    x @ y
    assert len(widths) == 1


def test_a_cpu_with_its_own_instructions_is_left_alone(monkeypatch):
    monkeypatch.setattr(bfloat16, "cpu_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(torch.library, "Library", None)
    with fast_bfloat16() as widened:
        assert not widened


def test_the_cpu_is_asked():
    assert isinstance(cpu_multiplies_bfloat16(), bool)
