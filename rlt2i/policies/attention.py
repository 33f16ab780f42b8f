"""Joint attention that can be watched without being changed.

Every joint-attention block of the network runs the same fused kernel, which returns the log-sum-exp of each query's
scores beside its output. From it the attention between image tokens and a few text tokens follows exactly,

    P[i, t] = exp(q_i . k_t / sqrt(d) - lse_i),

at the cost of the selected columns alone; the N x N matrix never exists. Recording only reads what the forward pass
computes anyway, so the velocity is the same, bit for bit, whether or not anybody watches.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from rlt2i.captures import DIRECTIONS, parse_attention_name, select_blocks

Kernel = Literal["cpu", "flash", "cudnn", "efficient"]
_aten = torch.ops.aten


def attend(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log-sum-exp of its scores.

    Args:
        query, key, value: [N, H, S, D].
        kernel: one fused kernel, the same for all blocks and phases: two kernels are two (slightly) different policies.

    Returns:
        ([N, H, S, D], [N, H, S]); only the first carries gradient.
    """
    if kernel == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False)[:2]
    elif kernel == "flash":
        out, lse = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False)[:2]
    elif kernel == "cudnn":
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out, lse = _aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[:2]
        lse = lse.squeeze(-1) if lse.ndim == 4 else lse
    else:
        out, lse = _aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[:2]
        lse = lse[..., : query.shape[2]]  # padded to a multiple of 32
    return out, lse


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
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
    problems = []
    for kernel in candidates:
        try:
            out, lse = attend(query, key, value, kernel)
        except RuntimeError as error:
            problems.append(f"{kernel}: {str(error).splitlines()[0]}")
            continue
        off = (out.double() - scores.softmax(-1) @ value.double()).abs().max()
        lse_off = (lse.double() - scores.logsumexp(-1)).abs().max()
        if off < 2e-2 and lse_off < 2e-2:
            return kernel
        problems.append(f"{kernel}: output off by {float(off):.2g}, log-sum-exp by {float(lse_off):.2g}")
    raise RuntimeError(f"No attention kernel works on {device} in {dtype}: {'; '.join(problems)}.")


# ------------------------------------------------------------------------------------------------------- the maps


def image_to_text(query: Tensor, key: Tensor, lse: Tensor, num_image: int, tokens: Tensor, members: Tensor) -> Tensor:
    """How much of each image token's attention goes to each concept: mean over heads, sum over the concept's tokens.

    Args:
        query, key: [N, H, S, D], image tokens first.
        lse: [N, H, S].
        num_image: image tokens among the S.
        tokens: [N, M] positions of the selected tokens in the text sequence.
        members: [N, M, K] 1 where token m belongs to concept k; a padding token belongs to none.

    Returns:
        [N, K, num_image] probabilities, float32 at least.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    chosen = _rows(key, tokens + num_image).to(wide)
    scores = query[:, :, :num_image].to(wide) @ chosen.mT * query.shape[-1] ** -0.5
    probability = (scores - lse[:, :, :num_image, None].to(wide)).exp_().mean(dim=1)
    return (probability @ members.to(wide)).mT


def text_to_image(query: Tensor, key: Tensor, lse: Tensor, num_image: int, tokens: Tensor, members: Tensor) -> Tensor:
    """Where each concept's own tokens look: rows of the joint softmax read at the image tokens.

    Mean over heads and over the concept's tokens; arguments and result as in `image_to_text`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    chosen = _rows(query, tokens + num_image).to(wide)
    scores = chosen @ key[:, :, :num_image].to(wide).mT * query.shape[-1] ** -0.5
    chosen_lse = lse.gather(2, (tokens + num_image)[:, None].expand(-1, lse.shape[1], -1))
    probability = (scores - chosen_lse[..., None].to(wide)).exp_().mean(dim=1)
    share = members.to(wide) / members.sum(dim=1, keepdim=True).clamp_min(1).to(wide)
    return share.mT @ probability


def _rows(sequence: Tensor, positions: Tensor) -> Tensor:
    """[N, H, S, D], [N, M] -> [N, H, M, D]."""
    _, heads, _, size = sequence.shape
    return sequence.gather(2, positions[:, None, :, None].expand(-1, heads, -1, size))


_MAPS = dict(zip(DIRECTIONS, (image_to_text, text_to_image), strict=True))


# -------------------------------------------------------------------------------------------------------- recorder


@attrs.define(eq=False)
class Recorder:
    """Reduces attention to concept maps during one pass of the network, block by block in order.

    It counts the blocks itself: were each block told its index, the compiler would need a graph for every one of them.

    Args:
        num_blocks: joint-attention blocks of the network.
        wanted: capture name -> (direction, block indices).
        tokens, members: as in `image_to_text`.
        grid: (h, w) of the image tokens.
    """

    num_blocks: int
    wanted: Mapping[str, tuple[str, tuple[int, ...]]]
    tokens: Tensor
    members: Tensor
    grid: tuple[int, int]
    _sums: dict[str, Tensor] = attrs.field(factory=dict, init=False)
    _seen: int = attrs.field(default=0, init=False)

    @torch.no_grad()
    def record(self, query: Tensor, key: Tensor, lse: Tensor) -> None:
        """Add the next block's attention to every map that asks for it; a direction is computed once."""
        block, self._seen = self._seen, self._seen + 1
        names = [name for name, (_, blocks) in self.wanted.items() if block in blocks]
        num_image = self.grid[0] * self.grid[1]
        for direction in {self.wanted[name][0] for name in names}:
            concept_map = _MAPS[direction](query, key, lse, num_image, self.tokens, self.members)  # type: ignore[index]
            for name in names:
                if self.wanted[name][0] == direction:
                    self._sums[name] = self._sums[name] + concept_map if name in self._sums else concept_map

    def captures(self) -> dict[str, Tensor]:
        """name -> [N, K, h, w] float32, the mean over the blocks."""
        assert self._seen == self.num_blocks, f"{self._seen} of {self.num_blocks} blocks reported"
        return {
            name: (self._sums[name] / len(blocks)).unflatten(-1, self.grid).float()
            for name, (_, blocks) in self.wanted.items()
        }


_active = threading.local()


@contextlib.contextmanager
def recording(
    names: frozenset[str], *, num_blocks: int, tokens: Tensor, members: Tensor, grid: tuple[int, int]
) -> Iterator[Recorder]:
    """Within this context every watched block reports to the recorder."""
    parsed = {name: parse_attention_name(name) for name in sorted(names)}
    wanted = {name: (direction, select_blocks(blocks, num_blocks)) for name, (direction, blocks) in parsed.items()}
    recorder = Recorder(num_blocks, wanted, tokens, members, grid)
    _active.recorder = recorder
    try:
        yield recorder
    finally:
        _active.recorder = None


def _report(query: Tensor, key: Tensor, lse: Tensor) -> None:
    recorder: Recorder | None = getattr(_active, "recorder", None)
    if recorder is not None:
        recorder.record(query, key, lse)


@torch.library.custom_op("rlt2i::watched_attention", mutates_args=())
def _watched_attention(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Tensor:
    """Opaque to the compiler: one graph serves both watched and unwatched passes, so their results are the same."""
    out, lse = attend(query, key, value, kernel)  # type: ignore[arg-type]
    _report(query, key, lse)
    return out


@_watched_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Tensor:
    return attend(query, key, value, kernel)[0]  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- processor


@attrs.frozen
class WatchedJointAttention:
    """diffusers' JointAttnProcessor2_0, operation by operation, on a kernel that yields the log-sum-exp."""

    kernel: Kernel

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        num_rows, num_image, _size = hidden_states.shape

        def heads(projected: Tensor, norm: Any = None) -> Tensor:
            split = projected.view(num_rows, -1, attn.heads, projected.shape[-1] // attn.heads).transpose(1, 2)
            return split if norm is None else norm(split)

        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(encoder_hidden_states))], dim=2)
        query = torch.cat(
            [
                heads(attn.to_q(hidden_states), attn.norm_q),
                heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q),
            ],
            dim=2,
        ).to(value.dtype)  # under autocast the norms promote to float32
        key = torch.cat(
            [
                heads(attn.to_k(hidden_states), attn.norm_k),
                heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k),
            ],
            dim=2,
        ).to(value.dtype)

        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            out = torch.ops.rlt2i.watched_attention(query, key, value, self.kernel)
        else:
            out, lse = attend(query, key, value, self.kernel)
            if not torch.compiler.is_compiling():
                _report(query, key, lse)

        out = out.transpose(1, 2).reshape(num_rows, -1, attn.heads * out.shape[-1])
        image, text = out[:, :num_image], out[:, num_image:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


def watch(transformer: torch.nn.Module, kernel: Kernel) -> None:
    """Put the watched processor on the joint attention of every block; the image-only `attn2` stays as it is."""
    for block in transformer.transformer_blocks:  # type: ignore[union-attr]
        block.attn.set_processor(WatchedJointAttention(kernel))
