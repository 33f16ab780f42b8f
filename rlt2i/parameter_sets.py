"""Named copies of the trainable parameters: "reference", "old", "ema".

The copies live on the device of the parameters. Putting one in force exchanges pointers, never bytes, and
never visits host memory; the `nn.Parameter` objects, their `.grad` and the optimizer that holds them stay the
same. `torch.func.functional_call` and `AveragedModel` would need a second module or a copy for every use.

Of sharded parameters (DTensors) every process keeps the copies of its own part. FSDP reads that part from a buffer of
its own, which an exchange of pointers would not reach, so there the bytes of the part are exchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlt2i.functional.shards import as_shard, is_sharded, local, shard_like

ONLINE = "online"

_WIDE = (torch.float32, torch.float64)
# A parameter under set number k carries its own version number plus k times this, so that autograd tells the
# graphs of different sets apart; no run takes as many optimiser steps.
_VERSION_STRIDE = 1 << 26


class ParameterSets:
    """The online parameters and named copies of them.

    Copies of parameters below float32 are kept in float32, because a slow average held in bfloat16 stops
    moving; they are rounded to the parameter's type while in force.

    Args:
        parameters: the trainable parameters by stable name (`Policy.trainable_parameters()`).

    Raises:
        ValueError: if there is nothing to copy, or two names share one parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        if not parameters:
            raise ValueError("ParameterSets({}): no trainable parameter to copy. Attach an adapter first.")
        owners: dict[int, str] = {}
        for name, parameter in parameters.items():
            first = owners.setdefault(id(parameter), name)
            if first != name:
                raise ValueError(f"ParameterSets: {name!r} and {first!r} are the same tied parameter. Pass it once.")
        self._parameters = dict(parameters)
        self._sets: dict[str, list[Tensor]] = {}
        self._in_force: list[str] = [ONLINE]
        self._online: list[Tensor] = []
        self._online_versions: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The named sets, in the order they were added; "online" is not one of them."""
        return tuple(self._sets)

    @property
    def in_force(self) -> str:
        """The set that the parameters hold now."""
        return self._in_force[-1]

    def _here(self) -> list[Tensor]:
        """What this process holds of every parameter."""
        return [local(p.detach()) for p in self._parameters.values()]

    def add(self, name: str) -> None:
        """Keep a copy of the online parameters as they are now.

        Raises:
            ValueError: if the name is taken, reserved or holds a "/", or if a set is in force.
        """
        self._refuse_while_in_force(f"add({name!r})")
        if name in self._sets:
            raise ValueError(f"ParameterSets.add({name!r}): the set exists. Refresh it with blend(..., keep=0).")
        if not name or name == ONLINE or "/" in name:
            raise ValueError(
                f"ParameterSets.add({name!r}): {ONLINE!r} names the parameters themselves and '/' separates "
                "set from parameter in a state. Choose another name, such as 'reference'."
            )
        self._sets[name] = [p.clone() if p.dtype in _WIDE else p.float() for p in self._here()]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Put a set in force, and the previous one back on leaving, also by an exception.

        Different sets nest; `use("online")` changes nothing outside of them and brings the online parameters
        back inside. A graph belongs to the set it was built under: running its backward under another set is
        an autograd error ("modified by an inplace operation") instead of a wrong gradient. A graph built
        before the block and run backward after it is not affected.

        Raises:
            ValueError: if the set is unknown or already in force.
            RuntimeError: on leaving, if the parameters were changed in place inside (an optimiser step).
        """
        if name == self._in_force[-1] == ONLINE:
            yield
            return
        if name != ONLINE and name not in self._sets:
            raise ValueError(self._unknown("use", name))
        if name != ONLINE and name in self._in_force:
            raise ValueError(
                f"ParameterSets.use({name!r}): already in force ({' > '.join(self._in_force)}). "
                "Leave the outer block first, or drop the inner one."
            )
        if len(self._in_force) == 1:
            self._online = [
                p.detach().to_local().clone() if is_sharded(p) else p.data for p in self._parameters.values()
            ]
            self._online_versions = tuple(p._version for p in self._parameters.values())
        self._in_force.append(name)
        versions = self._point_to(name)
        changed = False
        try:
            yield
            changed = versions != tuple(p._version for p in self._parameters.values())
        finally:
            self._in_force.pop()
            self._point_to(self._in_force[-1])
            if len(self._in_force) == 1:
                self._online = []
        if changed:
            raise RuntimeError(
                f"ParameterSets.use({name!r}): the parameters were changed in place inside the block, so the "
                "set itself may have moved. Step the optimizer outside the block."
            )

    @torch.no_grad()
    def blend(self, name: str, keep: float) -> None:
        """Set <- keep * set + (1 - keep) * online, in float32.

        Computed as an interpolation, so that a set equal to the online parameters stays so exactly; keep = 0
        copies.

        Raises:
            ValueError: if the set is unknown, if `keep` is outside [0, 1], or if a set is in force.
        """
        self._refuse_while_in_force(f"blend({name!r})")
        if name not in self._sets:
            raise ValueError(self._unknown("blend", name))
        if not 0 <= keep <= 1:
            raise ValueError(f"ParameterSets.blend({name!r}, keep={keep}): keep is a share; use one in [0, 1].")
        kept = self._sets[name]
        online = [p.to(s.dtype) for p, s in zip(self._here(), kept, strict=True)]
        if keep == 0:
            torch._foreach_copy_(kept, online)
        elif keep < 1:
            torch._foreach_lerp_(kept, online, 1 - keep)

    @torch.no_grad()
    def distance(self, name: str) -> Tensor:
        """||online - set|| / ||set|| over all parameters together.

        Returns:
            Scalar float32 on the parameters' device; 0 if both are zero, inf if only the set is.

        Raises:
            ValueError: if the set is unknown, or if a set is in force.
        """
        self._refuse_while_in_force(f"distance({name!r})")
        if name not in self._sets:
            raise ValueError(self._unknown("distance", name))
        kept = [s.float() for s in self._sets[name]]
        moved = [p.float() - s for p, s in zip(self._here(), kept, strict=True)]
        difference, size = (self._norm(x) for x in (moved, kept))
        return torch.where(difference == 0, torch.zeros_like(difference), difference / size)

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        parts = [as_shard(tensor, p) for tensor, p in zip(tensors, self._parameters.values(), strict=True)]
        norm = torch.nn.utils.get_total_norm(parts)
        return norm.full_tensor() if is_sharded(norm) else norm

    def values(self, name: str) -> dict[str, Tensor]:
        """The tensors of one set ("online" included) by parameter name, not copied; DTensors where parameters are.

        Write or clone them at once.

        Raises:
            ValueError: if the set is unknown.
        """
        if name != ONLINE and name not in self._sets:
            raise ValueError(self._unknown("values", name))
        tensors = self._sets[name] if name != ONLINE else self._online or self._here()
        return {
            key: as_shard(tensor, parameter)
            for (key, parameter), tensor in zip(self._parameters.items(), tensors, strict=True)
        }

    @torch.no_grad()
    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into one set ("online" included), bit for bit; of whole tensors, the part that is here.

        Raises:
            ValueError: if names, shapes or types differ from the set's; nothing is changed then.
        """
        self._refuse_while_in_force(f"load({name!r})")
        own = self.values(name)
        if missing := sorted(own.keys() ^ tensors.keys()):
            side = "missing from" if missing[0] in own else "unknown to this policy but in"
            raise ValueError(
                f"ParameterSets.load({name!r}): {missing[0]!r} is {side} the given tensors ({len(missing)} "
                "such names). They belong to another policy or adapter: use the recipe they were saved under."
            )
        for key, tensor in tensors.items():
            if tensor.shape != own[key].shape or tensor.dtype != own[key].dtype:
                raise ValueError(
                    f"ParameterSets.load({name!r}): {key!r} is {tensor.dtype} {list(tensor.shape)}, expected "
                    f"{own[key].dtype} {list(own[key].shape)}. Use the recipe it was saved under."
                )
        for key, tensor in tensors.items():
            local(own[key]).copy_(local(tensor) if is_sharded(tensor) else shard_like(tensor, own[key]))

    def state(self) -> dict[str, Tensor]:
        """All named sets in one flat mapping, "set/parameter" -> tensor; no copies."""
        return {f"{name}/{key}": tensor for name in self._sets for key, tensor in self.values(name).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state()`; the sets must have been added.

        Raises:
            ValueError: if the state holds other sets, or `load` refuses one.
        """
        names = {key.partition("/")[0] for key in state}
        if names != set(self._sets):
            raise ValueError(
                f"ParameterSets.load_state: got the sets {sorted(names)}, expected {sorted(self._sets)}. "
                "Use the recipe the state was saved under."
            )
        for name in self._sets:
            prefix = f"{name}/"
            self.load(name, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def _point_to(self, name: str) -> tuple[int, ...]:
        """Exchange the storages and give every parameter the version number of that set."""
        tensors = self._online if name == ONLINE else self._sets[name]
        parameters = tuple(self._parameters.values())
        for parameter, tensor in zip(parameters, tensors, strict=True):
            if is_sharded(parameter):
                with torch.no_grad():
                    local(parameter).copy_(tensor)
            else:
                parameter.data = tensor.to(parameter.dtype)
        # `.data =` keeps the version, which would let a backward pass read another set's values unnoticed.
        shift = 0 if name == ONLINE else _VERSION_STRIDE * (1 + self.names.index(name))
        versions = tuple(v + shift for v in self._online_versions)
        torch._C._autograd._unsafe_set_version_counter(parameters, versions)
        return versions

    def _refuse_while_in_force(self, call: str) -> None:
        if len(self._in_force) > 1:
            raise ValueError(
                f"ParameterSets.{call}: {self._in_force[-1]!r} is in force, so it is unclear which values "
                "are meant. Call it outside use(...)."
            )

    def _unknown(self, call: str, name: str) -> str:
        known = [ONLINE, *self._sets]
        return f"ParameterSets.{call}({name!r}): no such set; there are {known}. Call add({name!r}) first."


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of tensors: the identity of a set of weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
