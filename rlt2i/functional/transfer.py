"""Between host and device without a stall: the host waits for the device only where it reads a number.

A copy from ordinary memory makes the host wait until it has arrived, and an index, an identity or a schedule that was
known on the host should never be read back. So what is small is kept on both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TWIN = "_rlt2i_on_host"


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on the device that the host does not wait for; the tensor itself where it is there already.

    Args:
        tensor: not to be written to any more.
    """
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def on_both(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`to_device`, and `on_host` of the result costs nothing: for indices and identities, which nobody changes."""
    return with_twin(to_device(tensor, device), tensor)


def with_twin(there: Tensor, here: Tensor) -> Tensor:
    """A tensor of the device, whose numbers the host knows: `on_host` of it is `here`."""
    if there is not here and there.device.type != "cpu":
        setattr(there, _TWIN, here)
    return there


def on_host(tensor: Tensor) -> Tensor:
    """The same numbers on the host: what `on_both` kept there, otherwise a copy that the host waits for."""
    if tensor.device.type == "cpu":
        return tensor
    twin: Tensor | None = getattr(tensor, _TWIN, None)
    return tensor.cpu() if twin is None else twin


def chosen(values: Tensor, index: Tensor) -> Tensor:
    """values[index] on the device of the values; the host knows it where it knows both."""
    there = values[to_device(index, values.device)]
    known = all(tensor.device.type == "cpu" or hasattr(tensor, _TWIN) for tensor in (values, index))
    return with_twin(there, on_host(values)[on_host(index)]) if known else there
