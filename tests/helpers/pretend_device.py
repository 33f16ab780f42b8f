"""A device that no machine needs to have: its tensors claim to be elsewhere, and compute on the CPU.

Inside `pretend_device()` a tensor sent to `DEVICE` behaves like one on an accelerator as far as discipline goes: mixing
it with a tensor of the host is an error where it happens, and whatever would make the host wait for the device is
recorded with its source line. What it cannot show is speed, or what kernels round.

What waits: reading a number (`float`, `bool`, `tolist`), shapes that depend on values (`nonzero`, boolean indices,
`unique`), and copies between host and device, unless they are asked not to (`non_blocking=True`).
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from rlt2i.policies.guidance import Guided

DEVICE = torch.device("meta")
"""Where the tensors claim to be: a device that autograd knows, and on which no number can be computed by accident."""

_READS_VALUES = frozenset(
    "aten::" + name
    for name in (
        "_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
        "isin", "bincount", "allclose", "repeat_interleave", "argwhere",
    )
)  # fmt: skip
_INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})
_EFFICIENT = "aten::_scaled_dot_product_efficient_attention"
_ROOTS = ("rlt2i", "diffusers", "transformers", "peft")
_aten = torch.ops.aten


class MixedDevicesError(RuntimeError):
    """Tensors of host and device in one operation."""


@attrs.define
class Watch:
    """What happened on the pretended device: "kind at file:line source" -> times that the host waited for it."""

    waits: Counter[str] = attrs.field(factory=Counter)

    @property
    def total(self) -> int:
        """Times that the host waited."""
        return self.waits.total()

    def add(self, kind: str) -> None:
        self.waits[f"{kind} at {source_line()}"] += 1

    def table(self) -> str:
        """The waits, most frequent first."""
        return "\n".join(f"{count:5}  {where}" for where, count in self.waits.most_common())


_watch = Watch()


def source_line() -> str:
    """The innermost line of the package, or of a library of models, that is being executed."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        root = next((i for i in range(len(parts) - 1, -1, -1) if parts[i] in _ROOTS), None)
        if root is not None and parts[-1] != "transfer.py":  # who asked says more
            return f"{'/'.join(parts[root:])}:{frame.lineno} {(frame.line or '')[:90]}"
    return "a test"


class Elsewhere(Tensor):
    """A tensor that claims to be on DEVICE; `inner` has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        claimed = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=inner.requires_grad,
        )  # fmt: skip
        claimed.inner = inner
        return claimed

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _elsewhere(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    if name in ("aten::_to_copy", "aten::_pin_memory"):
        return _copied(func, args, kwargs, bool(there))
    if name == "aten::copy_":
        if isinstance(args[0], Elsewhere) != isinstance(args[1], Elsewhere) and not (args[2:] or [False])[0]:
            _watch.add("copy")
        _inner(args[0]).copy_(_inner(args[1]))
        return args[0]
    asked = kwargs.get("device")
    if _elsewhere(asked):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if there:
        _check(name, args, [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)])
    results = _computed(name, func, tree_map(_inner, args), tree_map(_inner, kwargs))
    if not (_elsewhere(asked) if asked is not None else bool(there)):
        return results
    own = {id(tensor.inner): tensor for tensor in there}  # in-place operations return what they were given

    def claimed(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, Elsewhere):
            return value
        return own[id(value)] if id(value) in own else Elsewhere(value)

    return tree_map(claimed, results)


def _copied(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_there: bool) -> Any:
    asked = kwargs.get("device")
    goes_there = _elsewhere(asked) if asked is not None else is_there
    if goes_there != is_there and not kwargs.get("non_blocking"):
        _watch.add("copy to the device" if goes_there else "copy to the host")
    inner = tree_map(_inner, args)
    copy = func(*inner, **{**kwargs, "device": torch.device("cpu")})
    copy = copy.clone() if copy is inner[0] else copy
    return Elsewhere(copy) if goes_there else copy


def _check(name: str, args: tuple[Any, ...], here: list[Tensor]) -> None:
    """Record what waits, and refuse tensors of the host beside one of the device, numbers (no axes) apart."""
    if name in _INDEXING:
        indices = [index for index in args[1] or () if isinstance(index, Tensor)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            fills = name != "aten::index" and args[2].numel() == 1  # runs as masked_fill, which waits for nothing
            _watch.add("boolean index") if not fills else None
        if isinstance(args[0], Elsewhere) and any(not isinstance(index, Elsewhere) for index in indices):
            _watch.add("index on the host")
            here = [tensor for tensor in here if not any(tensor is index for index in indices)]
    if mixed := [tensor for tensor in here if tensor.dim() > 0]:
        raise MixedDevicesError(f"{name}: a tensor {list(mixed[0].shape)} of the host and one of the device")
    if name in _READS_VALUES:
        _watch.add(name.removeprefix("aten::"))


def _computed(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the CPU; the memory-efficient attention, which it lacks, by the kernel that it has."""
    if name == _EFFICIENT:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], 0.0, False)
        return out, lse, torch.tensor(0), torch.tensor(0)
    if name == f"{_EFFICIENT}_backward":
        gradient, query, key, value, _, out, lse = args[:7]
        lse = lse[..., : query.shape[2]]
        return (
            *_aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, query, key, value, out, lse, 0.0, False
            ),
            None,
        )
    return func(*args, **kwargs)


class _OnDevice(TorchDispatchMode):
    """Catches operations without a tensor of the device among their arguments: factories, and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Python(TorchFunctionMode):
    """What never reaches the dispatcher: data of Python, and lists as indices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _elsewhere(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        first = args[0] if args else None
        if not isinstance(first, Elsewhere):
            return func(*args, **kwargs)
        if func is torch.Tensor.new_tensor and kwargs.get("device") is None:
            return torch.tensor(*args[1:], dtype=kwargs.get("dtype") or first.dtype).to(DEVICE)
        if func is torch.Tensor.numpy:
            raise TypeError(f"can't convert a tensor of the device to numpy, at {source_line()}")
        if func is torch.Tensor.tolist:
            _watch.add("tolist")
            return first.inner.tolist()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = tuple(map(_index, args[1])) if isinstance(args[1], tuple) else _index(args[1])
            args = (first, index, *args[2:])
        return func(*args, **kwargs)


def _index(index: Any) -> Any:
    return torch.tensor(index, dtype=None if index else torch.long).to(DEVICE) if isinstance(index, list) else index


def send(policy: Any) -> Any:
    """A policy that was loaded on the host, on DEVICE: to be called within `pretend_device()`."""
    if isinstance(policy, Guided):
        return attrs.evolve(policy, policy=send(policy.policy))
    policy.network.to(DEVICE)
    policy.vae.to(DEVICE)
    policy.text.device = DEVICE
    return attrs.evolve(policy, device=DEVICE)


@contextlib.contextmanager
def pretend_device() -> Iterator[Watch]:
    """Within it, tensors and modules can be sent to DEVICE; threads that are started within it know it too."""
    global _watch
    before, _watch = _watch, Watch()
    run = threading.Thread.run

    def run_with_device(self: threading.Thread) -> None:
        with _Python(), _OnDevice():
            run(self)

    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch.object(threading.Thread, "run", run_with_device), _Python(), _OnDevice():
            yield _watch
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        _watch = before
