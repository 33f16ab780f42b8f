"""Passes of a sharded network, in step: every process takes part in every pass of every other.

A sharded network gathers its weights while it computes, so a pass is work of all processes, whereas processes have
their own numbers of micro-batches: groups without advantage are skipped. Before each pass, and before each backward
pass, processes say what they are about to do. One that has nothing of the kind to do joins in with a pass over inputs
that it has seen before, whose gradient is zero. So it goes until all of them are about to do the same thing; every
other collective of a run is such a thing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rlt2i.distributed import Distributed, ProcessLost
from rlt2i.parameter_sets import ONLINE, ParameterSets
from rlt2i.policies.attention.recorder import unrecorded

_SETS = 1 << 16
_BACKWARD, _COLLECTIVE = 2 * _SETS, 2 * _SETS + 1
"""What a process may be about to do, in the order in which it is done where processes differ: a pass without gradient
under a parameter set (its number), a pass with gradient (`_SETS` more), a backward pass, another collective."""


class OutOfStep(RuntimeError):
    """Processes that cannot be brought in step; raised on all of them alike."""


@attrs.define(eq=False)
class Lockstep:
    """Keeps the passes of one network in step.

    Attributes:
        network: sharded.
        sets: of its parameters; a pass that is joined is made under the set of the others.
        distributed: this process among the others.
        group: of all processes, for messages in host memory, so that no device is waited for.
        precision: the context of the network's arithmetic.
    """

    network: torch.nn.Module
    sets: ParameterSets
    distributed: Distributed
    group: Any
    precision: Callable[[], contextlib.AbstractContextManager[Any]]
    _inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = attrs.field(default=None, init=False)
    _open: list[list[Tensor]] = attrs.field(factory=list, init=False)
    _joining: bool = attrs.field(default=False, init=False)
    _under_way: bool = attrs.field(default=False, init=False)
    _backward: bool = attrs.field(default=False, init=False)

    def watch(self) -> None:
        """From here on the network's passes, and the collectives of the run, are kept in step."""
        self.network.register_forward_pre_hook(self._before_pass, prepend=True, with_kwargs=True)
        self.network.register_forward_hook(self._after_pass)
        self.distributed.before_collective = self.join

    def join(self) -> None:
        """Take part in the passes of the others until all are about to use another collective.

        Raises:
            ProcessLost: when this process failed in the middle of a pass: it cannot follow the others any more.
            OutOfStep: see there.
        """
        if self._under_way:
            raise ProcessLost(
                f"process {self.distributed.rank} of {self.distributed.world_size} cannot go on: a pass of the sharded "
                "network broke off in its middle, here or because another process has ended, or did not answer for "
                f"{self.distributed.timeout:g} seconds. Look for the first error among the outputs of all processes; "
                "then start again with --resume, which goes on from the last checkpoint."
            )
        self._follow(_COLLECTIVE)
        self._open.clear()

    # ------------------------------------------------------------------------------------------- passes of its own

    def _before_pass(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._joining:
            self._inputs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            names = (ONLINE, *self.sets.names)
            self._follow(names.index(self.sets.in_force) + _SETS * torch.is_grad_enabled())
            self._under_way = True

    def _after_pass(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if self._joining:
            return None
        self._under_way = False
        if not torch.is_grad_enabled():
            return None
        output = pytree.tree_map_only(Tensor, lambda tensor: _Announced.apply(tensor, self, self.sets.in_force), output)
        self._open.append(_with_gradient(output))
        return output

    def _before_backward(self, weights: str) -> None:
        """Called once per output of a pass by autograd, before the backward pass of what is behind it."""
        if self._joining or self._backward:
            return
        if weights != self.sets.in_force:
            raise RuntimeError(
                f"a pass under the parameter set {weights!r} is run backward under {self.sets.in_force!r}: a sharded "
                "network would gather other weights than it was computed with. Run backward inside the same use(...)."
            )
        self._follow(_BACKWARD)
        self._open.clear()
        self._backward = self._under_way = True
        engine = torch.autograd.Variable._execution_engine
        # FSDP queues its last step after this; what is queued from within comes after that step.
        engine.queue_callback(lambda: engine.queue_callback(self._after_backward))

    def _after_backward(self) -> None:
        self._backward = self._under_way = False

    # ---------------------------------------------------------------------------------------- passes of the others

    def _follow(self, own: int) -> None:
        """Join the others until what this process is about to do is due."""
        while (due := self._due(own)) != own:
            self._join_backward() if due == _BACKWARD else self._join_pass(due)

    def _due(self, own: int) -> int:
        """What is done next by all processes.

        Raises:
            OutOfStep: when some process cannot take part in it.
        """
        report = torch.tensor([own, len(self._open), self._inputs is not None])
        reports = [torch.empty_like(report) for _ in range(self.distributed.world_size)]
        with self.distributed.together():
            torch.distributed.all_gather(reports, report, group=self.group)
        acts, passes, reported = torch.stack(reports).unbind(dim=1)
        due = int(acts.min())
        others = acts[acts != due]
        if due < _BACKWARD and not reported[acts != due].all():
            raise OutOfStep(
                "train.sharding: a process has no input for the network while others compute: no rollout of it is left "
                "to learn from. Give every process some (fewer processes, more prompts), or use train.sharding=none."
            )
        differing_passes = due == _BACKWARD and len(passes.unique()) > 1
        if differing_passes or (_SETS <= due < _BACKWARD and (others != _COLLECTIVE).any()):
            raise OutOfStep(
                "train.sharding: processes differ in the passes with gradient behind one loss, so they cannot gather "
                "weights together. With guidance at some noise levels only, set policy.uncond_grad=false; otherwise "
                "use train.sharding=none."
            )
        return due

    @contextlib.contextmanager
    def _taking_part(self) -> Iterator[None]:
        self._joining = self._under_way = True
        try:
            yield
            self._under_way = False  # not where it failed
        finally:
            self._joining = False

    def _join_pass(self, due: int) -> None:
        assert self._inputs is not None
        grad, number = divmod(due, _SETS)
        weights = (ONLINE, *self.sets.names)[number]
        use = contextlib.nullcontext() if weights == self.sets.in_force else self.sets.use(weights)
        with self._taking_part(), use, torch.set_grad_enabled(bool(grad)), self.precision(), unrecorded():
            output = self.network(*self._inputs[0], **self._inputs[1])
        if grad:
            self._open.append(_with_gradient(output))

    def _join_backward(self) -> None:
        outputs = [tensor for tensors in self._open for tensor in tensors]
        self._open.clear()
        with self._taking_part():
            torch.autograd.backward(outputs, [torch.zeros_like(tensor) for tensor in outputs])


class _Announced(torch.autograd.Function):
    """The identity; its backward comes before everything of the pass that made its input, FSDP's hooks included."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, lockstep: Lockstep, weights: str) -> Tensor:
        ctx.lockstep, ctx.weights = lockstep, weights
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.lockstep._before_backward(ctx.weights)
        return gradient, None, None


def _with_gradient(output: Any) -> list[Tensor]:
    return [tensor for tensor in pytree.tree_leaves(output) if isinstance(tensor, Tensor) and tensor.requires_grad]
