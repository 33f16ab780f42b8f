"""An adapter under the names of other tools; not a digit of what it does to the network changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.export.keys import Tool, published_modules, table_of

Pair = tuple[Tensor, Tensor]
"""(down [r, in], up [out, r]); the layer gains up @ down."""


@attrs.frozen(kw_only=True)
class Converted:
    """An adapter for a tool.

    Attributes:
        tensors: of the file.
        modules: that it changes, by the tool's names.
        known: how many of them the tool has.
    """

    tensors: Mapping[str, Tensor]
    modules: tuple[str, ...]
    known: int

    def summary(self) -> str:
        """How many of the saved keys find their layer."""
        return f"{self.known} of {len(self.modules)} layers matched, {len(self.modules) - self.known} unmatched"


def pairs_of(weights: Mapping[str, Tensor]) -> dict[str, Pair]:
    """Module -> (down, up), of an adapter in PEFT's names with the scale in `up`.

    Raises:
        ValueError: where a tensor has no partner.
    """
    downs = {name.removesuffix(".lora_A.weight"): t for name, t in weights.items() if name.endswith(".lora_A.weight")}
    ups = {name.removesuffix(".lora_B.weight"): t for name, t in weights.items() if name.endswith(".lora_B.weight")}
    if downs.keys() != ups.keys() or len(downs) + len(ups) != len(weights):
        raise ValueError(f"an adapter of {len(weights)} tensors that are no pairs of lora_A and lora_B.")
    return {name: (downs[name], ups[name]) for name in downs}


def convert(weights: Mapping[str, Tensor], network: Any, tool: Tool) -> Converted:
    """An adapter as `tool` reads it.

    Where the tool has one matrix for several layers, the ranks add up: `down` is stacked and `up` is block-diagonal,
    with zero rows for layers without an adapter. Conventions: ComfyUI `diffusion_model.NAME.lora_A.weight`; kohya
    `lora_unet_NAME_WITH_UNDERSCORES.lora_down.weight` with an alpha equal to the rank.

    Args:
        weights: of `exported_lora`, the scale in lora_B.
        network: that they adapt.
        tool: which.

    Raises:
        ValueError: when a layer has no name there.
    """
    modules = published_modules(table_of(tool, network), network)
    left = pairs_of(weights)
    pairs: dict[str, Pair] = {}
    for published, parts in modules.items():
        present = {part: left.pop(part) for part in parts if part in left}
        if present:
            pairs[published] = _stacked(present, parts, network)
    if left:
        raise ValueError(
            f"export --to {tool}: {len(left)} adapted layers have no name there, such as {sorted(left)[0]}. Use --to "
            "diffusers or merged, or train with other policy.lora_targets."
        )
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        if tool == "comfyui":
            tensors[f"diffusion_model.{name}.lora_A.weight"] = down
            tensors[f"diffusion_model.{name}.lora_B.weight"] = up
        else:
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.lora_up.weight"] = up
            tensors[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
    return Converted(tensors=tensors, modules=tuple(pairs), known=sum(name in modules for name in pairs))


def _stacked(pairs: Mapping[str, Pair], parts: tuple[str, ...], network: Any) -> Pair:
    if len(parts) == 1:
        down, up = pairs[parts[0]]
        return down.contiguous(), up.contiguous()
    rank = sum(down.shape[0] for down, _ in pairs.values())
    rows = [network.get_submodule(part).out_features for part in parts]
    first = next(iter(pairs.values()))[1]
    up = torch.zeros(sum(rows), rank, dtype=first.dtype)
    row = column = 0
    for part, height in zip(parts, rows, strict=True):
        if part in pairs:
            width = pairs[part][1].shape[1]
            up[row : row + height, column : column + width] = pairs[part][1]
            column += width
        row += height
    return torch.cat([down for down, _ in pairs.values()]).contiguous(), up
