"""Low-rank adapters on a diffusers network: float32 master weights, computed in the precision of their input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

FLOW_GRPO_TARGETS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
"""The joint-attention projections that every published SD3.5 recipe adapts; the image-only `attn2` is left alone."""


class MasterLinear(torch.nn.Linear):
    """A float32 weight used in the precision of its input, so that a bf16 network stays bf16 throughout."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


def add_lora(transformer: Any, *, rank: int, alpha: int, targets: tuple[str, ...], seed: int) -> None:
    """Attach a trainable adapter in place: A ~ N(0, 1/rank) from `seed`, B = 0; the global generators are not touched.

    Raises:
        ValueError: when a target names no layer.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    layers = [name for target in targets for name in _layers(transformer, target)]
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for matrices in (module.lora_A, module.lora_B):
                for name, linear in matrices.items():
                    matrices[name] = _master(linear)


def _layers(transformer: Any, target: str) -> list[str]:
    """The target, or the full names of its layers where others of that name are lists of layers (FLUX.2's to_out)."""
    matching = {name: part for name, part in transformer.named_modules() if f".{name}".endswith(f".{target}")}
    layers = [name for name, part in matching.items() if not isinstance(part, torch.nn.ModuleList)]
    if not layers:
        hint = f"; {target!r} is a list of layers, name {target + '.0'!r}" if matching else ""
        raise ValueError(f"lora_targets: no layer of the transformer is called {target!r}{hint}.")
    return [target] if len(layers) == len(matching) else layers


def _master(linear: torch.nn.Linear) -> MasterLinear:
    master = MasterLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    master.weight = torch.nn.Parameter(linear.weight.detach().float())
    return master


def exported_lora(network: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's tensors and its configuration, for a file.

    The scale alpha / rank is multiplied into B, and alpha = rank written, so that a loader that ignores the metadata
    still applies the adapter at full strength.

    Raises:
        RuntimeError: where tensors and trainable parameters do not agree.
    """
    from peft import get_peft_model_state_dict

    config = network.peft_config["default"]
    scale = config.lora_alpha / config.r
    weights = {
        name: (tensor * scale if "lora_B" in name else tensor).detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(network).items()
    }
    trained = sum(parameter.requires_grad for parameter in network.parameters())
    if not weights or len(weights) != trained:
        raise RuntimeError(f"LoRA export: {len(weights)} tensors to write for {trained} trainable parameters.")
    metadata = {**config.to_dict(), "lora_alpha": config.r}
    metadata["target_modules"] = sorted(metadata["target_modules"])
    return weights, metadata


def merged_weights(network: Any) -> dict[str, Tensor]:
    """The state of the network without adapters, where each adapted weight is W + alpha / rank B A.

    The sum is taken in float32 and rounded once to the precision of W.
    """
    from peft.tuners.lora import LoraLayer

    adapted = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
    weights = {
        name.replace(".base_layer.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in adapted.items():
        base = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = (base.float() + _delta(module).cpu().view(base.shape)).to(base.dtype)
    return weights


@contextlib.contextmanager
def merged(network: Any) -> Iterator[None]:
    """Within it the network computes with W + alpha / rank B A in place of W and the adapter; without gradient.

    A layer is one product instead of three. The sum is rounded once to the precision of W, so a velocity differs from
    the adapter's own by that rounding: in float32 by less than 1e-5 of its size, in bfloat16 by less than 2e-2, where
    an adapter's own rounding is as large. Not for ratios, which compare such differences. W comes back bit for bit.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    kept = [weight.data for weight in weights]
    try:
        for layer, weight in zip(layers, weights, strict=True):
            weight.data = (weight.data.float() + _delta(layer).view(weight.shape)).to(weight.dtype)
            layer.merged_adapters.append("default")
        with torch.no_grad():
            yield
    finally:
        for layer, weight, before in zip(layers, weights, kept, strict=True):
            weight.data = before
            layer.merged_adapters.clear()


def _delta(layer: Any) -> Tensor:
    """[out, in] float32, what the adapter adds to the weight of its layer."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    delta: Tensor = layer.scaling["default"] * up.detach().float().flatten(1) @ down.detach().float().flatten(1)
    return delta
