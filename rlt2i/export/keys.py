"""What the layers of a network are called elsewhere.

diffusers splits projections that the models' authors publish as one matrix. ComfyUI keeps the authors' names, and so do
kohya's sd-scripts (SD3, FLUX.1) and musubi-tuner (FLUX.2); Qwen-Image is published under the names that diffusers uses.
Each table maps a published module to the diffusers modules whose rows it stacks, in order; `{i}` is a block's number.
Modulations whose halves diffusers swaps are left out: they cannot be renamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

Tool = Literal["comfyui", "kohya"]
Table = Mapping[str, tuple[str, ...]]


def _qkv(published: str, block: str, names: str = "to_q to_k to_v") -> dict[str, tuple[str, ...]]:
    return {published: tuple(f"{block}.{name}" for name in names.split())}


def _sd3() -> dict[str, tuple[str, ...]]:
    x, context, block = "joint_blocks.{i}.x_block", "joint_blocks.{i}.context_block", "transformer_blocks.{i}"
    return {
        **_qkv(f"{x}.attn.qkv", f"{block}.attn"),
        **_qkv(f"{x}.attn2.qkv", f"{block}.attn2"),
        **_qkv(f"{context}.attn.qkv", f"{block}.attn", "add_q_proj add_k_proj add_v_proj"),
        f"{x}.attn.proj": (f"{block}.attn.to_out.0",),
        f"{x}.attn2.proj": (f"{block}.attn2.to_out.0",),
        f"{context}.attn.proj": (f"{block}.attn.to_add_out",),
        f"{x}.mlp.fc1": (f"{block}.ff.net.0.proj",),
        f"{x}.mlp.fc2": (f"{block}.ff.net.2",),
        f"{context}.mlp.fc1": (f"{block}.ff_context.net.0.proj",),
        f"{context}.mlp.fc2": (f"{block}.ff_context.net.2",),
        f"{x}.adaLN_modulation.1": (f"{block}.norm1.linear",),
        "context_embedder": ("context_embedder",),
    }


def _double(first: str, second: str) -> dict[str, tuple[str, ...]]:
    """The double-stream blocks of both FLUX generations; `first` and `second` are the layers of a feed-forward."""
    out, block = "double_blocks.{i}", "transformer_blocks.{i}"
    return {
        **_qkv(f"{out}.img_attn.qkv", f"{block}.attn"),
        **_qkv(f"{out}.txt_attn.qkv", f"{block}.attn", "add_q_proj add_k_proj add_v_proj"),
        f"{out}.img_attn.proj": (f"{block}.attn.to_out.0",),
        f"{out}.txt_attn.proj": (f"{block}.attn.to_add_out",),
        f"{out}.img_mlp.0": (f"{block}.ff.{first}",),
        f"{out}.img_mlp.2": (f"{block}.ff.{second}",),
        f"{out}.txt_mlp.0": (f"{block}.ff_context.{first}",),
        f"{out}.txt_mlp.2": (f"{block}.ff_context.{second}",),
    }


def _flux() -> dict[str, tuple[str, ...]]:
    single = "single_transformer_blocks.{i}"
    return {
        **_double("net.0.proj", "net.2"),
        "double_blocks.{i}.img_mod.lin": ("transformer_blocks.{i}.norm1.linear",),
        "double_blocks.{i}.txt_mod.lin": ("transformer_blocks.{i}.norm1_context.linear",),
        "single_blocks.{i}.linear1": (*(f"{single}.attn.to_{x}" for x in "qkv"), f"{single}.proj_mlp"),
        "single_blocks.{i}.linear2": (f"{single}.proj_out",),
        "single_blocks.{i}.modulation.lin": (f"{single}.norm.linear",),
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "final_layer.linear": ("proj_out",),
    }


def _flux2() -> dict[str, tuple[str, ...]]:
    return {
        **_double("linear_in", "linear_out"),
        "single_blocks.{i}.linear1": ("single_transformer_blocks.{i}.attn.to_qkv_mlp_proj",),
        "single_blocks.{i}.linear2": ("single_transformer_blocks.{i}.attn.to_out",),
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
    }


def _stacked_attention(places: str, attention: str, feed_forward: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    for place in places.split():
        block = f"{place}.{{i}}"
        table |= _qkv(f"{block}.attention.qkv", f"{block}.{attention}")
        table[f"{block}.attention.out"] = (f"{block}.{attention}.to_out.0",)
        for number, name in enumerate(feed_forward, 1):
            table[f"{block}.feed_forward.w{number}"] = (f"{block}.feed_forward.{name}",)
    return table


_LAYERS = "layers noise_refiner context_refiner"
SAME: Table = {}
"""Published under the names of diffusers."""

COMFYUI: Mapping[str, Table] = {
    "SD3Transformer2DModel": _sd3(),
    "FluxTransformer2DModel": _flux(),
    "Flux2Transformer2DModel": _flux2(),
    "QwenImageTransformer2DModel": SAME,
    "ZImageTransformer2DModel": _stacked_attention(_LAYERS, "attention", ("w1", "w2", "w3")),
}
KOHYA: Mapping[str, Table] = {
    "SD3Transformer2DModel": _sd3(),
    "FluxTransformer2DModel": _flux(),
    "Flux2Transformer2DModel": _flux2(),
    "QwenImageTransformer2DModel": SAME,
    "ZImageTransformer2DModel": SAME,
    "UNet2DConditionModel": SAME,
}


def table_of(tool: Tool, network: Any) -> Table:
    """The names of a network's layers in a tool.

    Raises:
        ValueError: when the tool's names for this network are not on record.
    """
    tables = COMFYUI if tool == "comfyui" else KOHYA
    kind = type(network).__name__
    if kind not in tables:
        known = ", ".join(sorted(tables))
        raise ValueError(
            f"export --to {tool}: the names that {tool} gives to a {kind} are not on record, only those of {known}. "
            "Use --to diffusers, peft or merged."
        )
    return tables[kind]


def published_modules(table: Table, network: Any) -> dict[str, tuple[str, ...]]:
    """Published module -> the network's modules that make it up, for every block that there is."""
    linear = {name: True for name, module in network.named_modules() if hasattr(module, "in_features")}
    linear = {name: True for name in linear if ".base_layer" not in name and ".lora_" not in name}
    if not table:
        return {name: (name,) for name in linear}
    return {published: parts for published, parts in _instances(table, linear) if all(part in linear for part in parts)}


def _instances(table: Table, modules: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for published, parts in table.items():
        pattern = re.compile(re.escape(parts[0]).replace(r"\{i\}", r"(\d+)"))
        for name in modules:
            if match := pattern.fullmatch(name):
                number = match[1] if match.groups() else ""
                yield published.replace("{i}", number), tuple(part.replace("{i}", number) for part in parts)
