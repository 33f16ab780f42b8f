"""What learned, in the formats that diffusers loads: an adapter, the network, or both in one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlt2i.policies.lora import exported_lora, merged_weights
from rlt2i.policies.pretrained.spec import PretrainedSpec


def export_adapter(spec: PretrainedSpec, pipe: Any, folder: Path) -> None:
    """`pytorch_lora_weights.safetensors`, as the pipeline's `load_lora_weights` reads it."""
    weights, metadata = exported_lora(getattr(pipe, spec.network))
    options: dict[str, Any] = {
        f"{spec.network}_lora_layers": weights,
        f"{spec.network}_lora_adapter_metadata": metadata,
    }
    type(pipe).save_lora_weights(folder, **options, safe_serialization=True)


def export_network(spec: PretrainedSpec, pipe: Any, folder: Path) -> None:
    """The network with its adapter, if it has one, merged into the weights.

    With the rest of the pipeline where that is a local directory: then `folder` is a pipeline of its own.
    """
    network = network_of(spec, pipe)
    network.save_pretrained(folder / spec.network, safe_serialization=True)
    source = spec.source
    if isinstance(source, Path):
        for name in set(spec.config("")) - {spec.network}:
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
                _cast(folder / name, next(network.parameters()).dtype)
        shutil.copy(source / "model_index.json", folder)


def network_of(spec: PretrainedSpec, pipe: Any) -> Any:
    """The network, or a copy of it with its adapter merged."""
    network = getattr(pipe, spec.network)
    return network if spec.lora_rank is None else rebuilt(network, merged_weights(network))


def _cast(folder: Path, dtype: torch.dtype) -> None:
    """Give a component the precision of the network: a pipeline of two precisions loads, but cannot draw."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    config = folder / "config.json"
    if config.is_file() and "dtype" in (fields := json.loads(config.read_text(encoding="utf-8"))):
        text = json.dumps({**fields, "dtype": str(dtype).removeprefix("torch.")}, indent=2, sort_keys=True)
        config.write_text(text + "\n", encoding="utf-8")


def rebuilt(network: Any, weights: dict[str, Tensor]) -> Any:
    """A network of the same configuration, without adapters and in one piece, that holds the weights given."""
    with torch.device("meta"):
        plain = type(network).from_config(network.config)
    plain.load_state_dict(weights, strict=True, assign=True)
    return plain
