"""Counting what the transformer computes and keeps: formulas for the arithmetic, a meta pass for the memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlt2i.policies.attention import attend

# ------------------------------------------------------------------------------------------------------ arithmetic


@attrs.frozen
class Layer:
    """One linear layer of the transformer.

    Attributes:
        name: in the transformer, without adapter prefixes.
        rows: tokens it processes per sequence.
        inputs, outputs: its size.
        block: index, or -1 outside the blocks.
    """

    name: str
    rows: int
    inputs: int
    outputs: int
    block: int


def linear_layers(transformer: nn.Module, num_image: int, num_text: int) -> Iterator[Layer]:
    """Every linear layer (the patch embedding is one) with the tokens it sees."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name:
            name = name.removesuffix(".base_layer")
            block = int(name.split(".")[1]) if name.startswith("transformer_blocks.") else -1
            yield Layer(name, _rows(name, num_image, num_text), module.weight[0].numel(), len(module.weight), block)


def _rows(name: str, num_image: int, num_text: int) -> int:
    if name.startswith(("time_text_embed", "norm_out")) or ".norm1" in name:
        return 1  # the modulation is one vector per sequence
    text = name == "context_embedder" or any(part in name for part in (".attn.add_", ".to_add_out", ".ff_context."))
    return num_text if text else num_image


def attention_flops(config: Mapping[str, Any], num_image: int, num_text: int) -> tuple[float, float]:
    """Forward arithmetic of (joint attention, image-only attention) in one block: two products of S x S x width."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return 4.0 * (num_image + num_text) ** 2 * width, 4.0 * num_image**2 * width


def transformer_flops(
    transformer: Any, num_image: int, num_text: int, *, lora_rank: int | None, lora_targets: tuple[str, ...] = ()
) -> tuple[float, float]:
    """(forward, backward) arithmetic of one sequence.

    Args:
        transformer: an SD3Transformer2DModel, on any device.
        num_image, num_text: tokens.
        lora_rank, lora_targets: the adapter; None counts the gradient of every weight.
    """
    config = transformer.config
    forward = backward = 0.0
    for layer in linear_layers(transformer, num_image, num_text):
        product = 2.0 * layer.rows * layer.inputs * layer.outputs
        forward += product
        if lora_rank is None:
            reads_data = layer.name in ("pos_embed.proj", "context_embedder") or layer.name.endswith("der.linear_1")
            backward += product if reads_data else 2 * product
            continue
        adapted = any(layer.name.endswith(f".{target}") for target in lora_targets)
        # Gradients stop where nothing upstream learns: embeddings, modulation, and the input of the first block.
        input_grad = layer.rows > 1 and layer.name not in ("pos_embed.proj", "context_embedder")
        if layer.block == 0 and (".attn2." in layer.name or layer.name.split(".attn.")[-1] in _PROJECTIONS):
            input_grad = False
        backward += product * input_grad
        if adapted:
            down, up = (2.0 * layer.rows * lora_rank * size for size in (layer.inputs, layer.outputs))
            forward += down + up
            backward += down + 2 * up + down * input_grad
    joint, image_only = attention_flops(config, num_image, num_text)
    num_dual = len(config["dual_attention_layers"])
    forward += config["num_layers"] * joint + num_dual * image_only
    # A fused kernel recomputes the scores in the backward pass: five products instead of two.
    with_grad = num_dual - (0 in config["dual_attention_layers"] and lora_rank is not None)
    backward += 2.5 * (config["num_layers"] * joint + with_grad * image_only)
    return forward, backward


_PROJECTIONS = frozenset({"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"})


def capture_flops(config: Mapping[str, Any], num_image: int, num_tokens: int, num_blocks: int) -> float:
    """Arithmetic of recording one attention direction: scores of the selected tokens, then exp and mean over heads."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return num_blocks * num_image * num_tokens * (2.0 * width + 4.0 * config["num_attention_heads"])


# ---------------------------------------------------------------------------------------------------------- memory


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Without a device, scaled_dot_product_attention falls back to explicit matrices; no real device does.

    Replaced by name, because a function mode would not reach the blocks that a checkpointed backward pass runs again.
    """
    original = functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return attend(query, key, value, "cpu")[0]

    functional.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


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
