"""Watched blocks: scaled_dot_product_attention, called inside them, runs on a kernel that yields the log-sum-exp.

diffusers' own attention processors stay as they are, so queries and keys are read as the kernel sees them: after
normalisation and rotary embedding, from whatever projection they come. The interception is part of a block's forward
pass, watched or not, and so of the pass that gradient checkpointing runs again.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from rlt2i.policies.attention.kernels import Kernels, as_bias, attend, choose_kernels
from rlt2i.policies.attention.recorder import report


@torch.library.custom_op("rlt2i::watched_attention", mutates_args=())
def _watched_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None, kernel: str
) -> Tensor:
    """Opaque to the compiler: one graph serves both watched and unwatched passes, so their results are the same."""
    out, lse = attend(query, key, value, kernel, bias=bias, scale=scale)  # type: ignore[arg-type]
    report(query, key, lse, bias, scale)
    return out


@_watched_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None, kernel: str) -> Tensor:
    return attend(query, key, value, kernel, bias=bias, scale=scale)[0]  # type: ignore[arg-type]


def kernel_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]:
    """query, key, value, bias and scale of `attend`; arguments are those of scaled_dot_product_attention."""
    assert dropout_p == 0.0, "an image backbone drops no attention"
    assert not is_causal, "an image backbone hides nothing of the future"
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, norms promote to float32
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return query, key, value, as_bias(attn_mask, query.dtype), scale


def watched(kernels: Kernels, *args: Any, **kwargs: Any) -> Tensor:
    """scaled_dot_product_attention that reports; arguments are its own."""
    query, key, value, bias, scale = kernel_inputs(*args, **kwargs)
    kernel = kernels.plain if bias is None else kernels.masked
    compiling = torch.compiler.is_compiling()
    if compiling and not torch.is_grad_enabled():
        out: Tensor = torch.ops.rlt2i.watched_attention(query, key, value, bias, scale, kernel)
        return out
    out, lse = attend(query, key, value, kernel, bias=bias, scale=scale)
    if not compiling:
        report(query, key, lse, bias, scale)
    return out


class _Interception(TorchFunctionMode):
    """Within it, scaled_dot_product_attention is `watched`."""

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return watched(self.kernels, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def watch(attentions: Iterable[torch.nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Watch the attention of these modules, in place: each calls scaled_dot_product_attention once in a pass, or
    once for the image (`Where.keys`).

    Args:
        attentions: in the order in which they run.
        dtype: of queries and keys.
    """
    forwards: dict[Any, Callable[..., Any]] = {}  # one function per kind of attention: one graph for the compiler
    for attention in attentions:
        kind, head_dim = type(attention), _head_dim(attention)
        if (kind, head_dim) not in forwards:
            kernels = choose_kernels(device, dtype, head_dim)
            forwards[kind, head_dim] = _intercepted(kind.forward, kernels)
        attention.forward = types.MethodType(forwards[kind, head_dim], attention)


def _intercepted(original: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Interception(kernels):
            return original(self, *args, **kwargs)

    return forward


def _head_dim(attention: Any) -> int:
    """Of diffusers' attention modules, which name it in two ways."""
    return int(getattr(attention, "head_dim", None) or attention.inner_dim // attention.heads)
