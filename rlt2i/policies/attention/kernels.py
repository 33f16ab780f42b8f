"""One fused attention kernel for every pass, which returns the log-sum-exp of each query's scores beside its output."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from torch import Tensor
from torch.nn import functional

Kernel = Literal["cpu", "flash", "cudnn", "efficient"]
_aten = torch.ops.aten
_BIAS_ALIGNMENT = 8
"""The memory-efficient kernel reads the rows of a bias in steps of this many numbers."""


@attrs.frozen
class Kernels:
    """The kernel of one attention: two kernels are two (slightly) different policies, so each call has its own.

    Attributes:
        plain: where every query sees every key.
        masked: where a mask or bias is given; not all kernels take one.
    """

    plain: Kernel
    masked: Kernel


def attend(
    query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, *, bias: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log-sum-exp of its scores.

    Args:
        query, key, value: [N, H, S, D] and [N, H, L, D].
        kernel: one fused kernel, the same for all phases.
        bias: [N|1, H|1, S|1, L], added to the scores; -inf hides a key. None hides nothing.
        scale: of the scores; None is 1 / sqrt(D).

    Returns:
        ([N, H, S, D], [N, H, S]); only the first carries gradient.
    """
    if kernel == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias, scale=scale
        )[:2]
    elif kernel == "flash":
        assert bias is None, "the flash kernel takes no bias"
        out, lse = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)[:2]
    elif kernel == "cudnn":
        assert bias is None, "masked attention runs on the memory-efficient kernel"
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out, lse = _aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)[:2]
        lse = lse.squeeze(-1) if lse.ndim == 4 else lse
    else:
        wide = None if bias is None else _aligned(bias, query, key)
        out, lse = _aten._scaled_dot_product_efficient_attention(query, key, value, wide, True, scale=scale)[:2]
        lse = lse[..., : query.shape[2]]  # padded to a multiple of 32
    return out, lse


def _aligned(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """[N, H, S, L], a view into rows whose length the kernel can read."""
    num_keys = key.shape[2]
    padded = functional.pad(bias, (0, -num_keys % _BIAS_ALIGNMENT))
    return padded.expand(*query.shape[:3], -1)[..., :num_keys]


def as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask (True: visible) as a bias, as scaled_dot_product_attention reads it."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def choose_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    """The kernels of one attention, see `choose_kernel`."""
    if device.type in ("cpu", "meta"):
        return Kernels("cpu", "cpu")
    return Kernels(choose_kernel(device, dtype, head_dim), choose_kernel(device, dtype, head_dim, masked=True))


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, *, masked: bool = False) -> Kernel:
    """The first kernel that runs on this device, in this precision, and agrees with plain softmax attention.

    Raises:
        RuntimeError: when none does.
    """
    if device.type == "cpu":
        return "cpu"
    candidates: tuple[Kernel, ...] = ("cudnn", "flash", "efficient") if dtype != torch.float32 else ("efficient",)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 96, head_dim, generator=draw).to(device, dtype) for _ in range(3))
    scores = query.double() @ key.double().mT * head_dim**-0.5
    bias = None
    if masked:
        candidates = ("efficient",)
        bias = as_bias(torch.arange(96, device=device)[None, None, None] < 77, dtype)
        scores = scores + bias.double()  # type: ignore[union-attr]
    problems = []
    for kernel in candidates:
        try:
            out, lse = attend(query, key, value, kernel, bias=bias)
        except RuntimeError as error:
            problems.append(f"{kernel}: {str(error).splitlines()[0]}")
            continue
        off = (out.double() - scores.softmax(-1) @ value.double()).abs().max()
        lse_off = (lse.double() - scores.logsumexp(-1)).abs().max()
        if off < 2e-2 and lse_off < 2e-2:
            return kernel
        problems.append(f"{kernel}: output off by {float(off):.2g}, log-sum-exp by {float(lse_off):.2g}")
    raise RuntimeError(f"No attention kernel works on {device} in {dtype}: {'; '.join(problems)}.")
