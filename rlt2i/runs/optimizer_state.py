"""Optimizer and generator state as named tensors and JSON: exact, no pickle, in any parameter order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlt2i.functional.shards import as_shard, is_sharded, shard_like

_SHAPED = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
# How a kernel executes is a property of this machine and build, not of the run that is resumed.
_EXECUTION_FLAGS = {"foreach", "fused", "capturable", "differentiable"}


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by name and JSON.

    Args:
        optimizer: any torch optimizer with one mapping of state per parameter (AdamW, Adam, SGD, ...).
        names: the parameters by stable name; at least those the optimizer holds.

    Returns:
        tensors: "parameter/entry" -> tensor ("blocks.0.weight/exp_avg"), not copied.
        state: JSON: "groups", each with its parameters' names and its hyper-parameters, and "scalars", the
            entries that are plain numbers.

    Raises:
        ValueError: if the optimizer holds a parameter without a name, or state that is no tensor or number.
    """
    name_of = _inverse(optimizer, names)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, float | int | bool | None] = {}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            full = f"{name_of[id(parameter)]}/{key}"
            if isinstance(value, Tensor):
                tensors[full] = value.detach()
            elif isinstance(value, float | int | None):
                scalars[full] = value
            else:
                raise ValueError(
                    f"optimizer_tensors: {full!r} is a {type(value).__name__}, neither tensor nor number. "
                    "Use an optimizer whose state is tensors, such as torch.optim.AdamW."
                )
    groups = [
        {
            "parameters": [name_of[id(p)] for p in group["params"]],
            "options": {k: _number(v) for k, v in group.items() if k not in _EXECUTION_FLAGS | {"params"}},
        }
        for group in optimizer.param_groups
    ]
    return tensors, {"optimizer": type(optimizer).__name__, "groups": groups, "scalars": scalars}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """The inverse of `optimizer_tensors`, bit for bit; parameters and groups may be in another order.

    Hyper-parameters come from `state`; how kernels execute (fused, foreach, ...) stays as this optimizer was
    built.

    Raises:
        ValueError: if the optimizer is of another kind or groups its parameters differently, or a shape
            differs; nothing is changed then.
    """
    name_of = _inverse(optimizer, names)
    if state["optimizer"] != type(optimizer).__name__:
        raise ValueError(
            f"restore_optimizer: the checkpoint holds the state of {state['optimizer']}, this run uses "
            f"{type(optimizer).__name__}. Use the recipe it was saved under."
        )
    saved = {frozenset(group["parameters"]): group["options"] for group in state["groups"]}
    current = {frozenset(name_of[id(p)] for p in group["params"]): group for group in optimizer.param_groups}
    if saved.keys() != current.keys():
        odd = sorted(frozenset().union(*saved) ^ frozenset().union(*current))
        raise ValueError(
            f"restore_optimizer: the checkpoint's {len(saved)} parameter groups differ from this run's "
            f"{len(current)}{f', first at {odd[0]!r}' if odd else ''}. Use the recipe it was saved under."
        )
    options_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    restored: dict[Tensor, dict[str, Any]] = {}
    for full, value in (*tensors.items(), *state["scalars"].items()):
        name, _, key = full.rpartition("/")
        if name not in names:
            raise ValueError(f"restore_optimizer: {full!r} belongs to no parameter here. Use its own recipe.")
        parameter = names[name]
        if isinstance(value, Tensor):
            if key in _SHAPED and value.shape != parameter.shape:
                raise ValueError(
                    f"restore_optimizer: {full!r} has shape {list(value.shape)}, its parameter "
                    f"{list(parameter.shape)}. Use the recipe it was saved under."
                )
            # torch keeps step counts on the host unless the kernel reads them on the device.
            group = options_of[id(parameter)]
            on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
            if key in _SHAPED and is_sharded(parameter):  # the whole is at hand, a part of it belongs here
                value = as_shard(shard_like(value, parameter).to(parameter.device, copy=True), parameter)
            else:
                value = value.clone() if on_host else value.to(parameter.device, copy=True)
        restored.setdefault(parameter, {})[key] = value
    optimizer.state.clear()
    optimizer.state.update(restored)
    for members, group in current.items():
        for key, value in saved[members].items():
            if isinstance(group.get(key), Tensor):  # a compiled step reads the rate from this very tensor
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def generator_state(generator: torch.Generator) -> Tensor:
    """[n] uint8: everything a generator remembers."""
    return generator.get_state()


def restore_generator(generator: torch.Generator, state: Tensor) -> None:
    """The inverse of `generator_state`.

    Raises:
        ValueError: if the state is not uint8, or is that of another kind of device.
    """
    own = generator.get_state()
    if state.dtype is not torch.uint8 or state.shape != own.shape:
        raise ValueError(
            f"restore_generator: got {state.dtype} {list(state.shape)}, a {generator.device.type} generator "
            f"has torch.uint8 {list(own.shape)}. Resume on the kind of device it was saved on."
        )
    generator.set_state(state.cpu())


def _inverse(optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]) -> dict[int, str]:
    name_of = {id(parameter): name for name, parameter in names.items()}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in name_of:
                raise ValueError(
                    f"optimizer: parameter {place} of group {number}, shape {list(parameter.shape)}, has no "
                    "name. Pass every trainable parameter in `names`."
                )
    return name_of


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
