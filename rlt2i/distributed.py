"""This process among the others: a thin layer over accelerate, and no cost at all where there is only one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

TIMEOUT = 1800.0
"""Seconds that a process waits for the others, unless the recipe says otherwise."""


_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun and the MPI launchers say how many processes there are."""


BUCKET = 25 * 2**20
"""Bytes that `sum_in_buckets` sends at once: enough that the latency of a message no longer counts, and small beside a
model."""


class LaunchError(RuntimeError):
    """The processes of a run did not find each other."""


class ProcessLost(RuntimeError):
    """Another process of this run has ended, or did not answer in time."""


class OtherProcessFailed(RuntimeError):
    """Something could not be done on another process, which says why; so no process goes on."""


class Stopped(Exception):
    """Some process was asked to stop, so all of them leave what they were doing."""


_TOLD = "rlt2i_told_all"
_GOES_ON, _STOPS, _FAILED = range(3)


def processes_launched() -> int:
    """How many processes the launcher says that it started; 1 without a launcher.

    Raises:
        LaunchError: when `accelerate launch` was asked for several and started one, as it does on the CPU.
    """
    sizes = [int(os.environ[name]) for name in _SIZES if os.environ.get(name)]
    if not sizes and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise LaunchError(
            "accelerate launch was asked for several processes and started one: without accelerators it needs mpirun "
            "(--mpirun_hostfile). Use `torchrun --nproc-per-node N -m rlt2i train ...`, or `accelerate launch "
            "--multi_gpu --num_processes N -m rlt2i train ...`, which joins processes on the CPU too."
        )
    return max(sizes, default=1)


def telling(error: Exception | None) -> Exception | None:
    """The error, marked as one that all processes were told of, so that all of them stop at the same place."""
    if error is not None:
        setattr(error, _TOLD, True)
    return error


def told_all(error: BaseException) -> bool:
    """Whether all processes were told of an error of this one."""
    return bool(getattr(error, _TOLD, False))


@contextlib.contextmanager
def because_of(error: Exception | None) -> Iterator[None]:
    """Where processes cannot even agree on an error any more, say what it was.

    Raises:
        ProcessLost: with the error in its message.
    """
    try:
        yield
    except ProcessLost as lost:
        if error is None or isinstance(error, ProcessLost):
            raise
        raise ProcessLost(f"{type(error).__name__}: {error}\n{lost}") from error


def sum_in_buckets(
    tensors: Sequence[Tensor], reduce_sum: Callable[[Tensor], Tensor], *, bucket_bytes: int = BUCKET
) -> list[Tensor]:
    """Every tensor summed over all processes, in few messages instead of one a tensor.

    An all-reduce adds element by element, so between two processes the bits are those of summing each tensor by itself.
    Among more, the order in which a collective adds depends on where an element lies in its message: a sum of n numbers
    may then differ by n - 1 roundings, at most (n - 1) 2^-24 of the sum of their sizes in float32.

    Args:
        tensors: in the same order and with the same shapes on every process.
        reduce_sum: adds a tensor up over all processes.
        bucket_bytes: of a message; a larger tensor has one for itself.
    """
    summed: list[Tensor] = []
    for bucket in _buckets(tensors, bucket_bytes):
        flat = reduce_sum(torch.cat([tensor.reshape(-1) for tensor in bucket]))
        parts = flat.split([tensor.numel() for tensor in bucket])
        summed += [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)]
    return summed


def _buckets(tensors: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, together no larger than a bucket."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(other.nbytes for other in bucket) + tensor.nbytes > bucket_bytes
        if bucket and (full or (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _nothing() -> None: ...


class Distributed:
    """Rank, device and the few collectives that training needs.

    Launch several with `torchrun`, `accelerate launch` or `rlt2i train --on ray`; gradients are summed once per
    optimiser step, whatever the number of backward passes, because the losses of all processes are shares of one mean.

    Args:
        timeout: seconds to wait for the others in a collective; one that died ends the wait at once.

    Attributes:
        before_collective: called before each collective below, on every process: a sharded network keeps its own passes
            in step with the others there.

    Raises:
        LaunchError: when a launcher started several processes and they did not become one group.
    """

    def __init__(self, *, timeout: float = TIMEOUT) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        launched = processes_launched()
        # accelerate joins no group on the CPU unless it is told to use the CPU; on a machine without an accelerator
        # every process of torchrun would otherwise be a run of its own.
        self._accelerator: Any = Accelerator(
            cpu=launched > 1 and not torch.accelerator.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
        )
        self._device: torch.device = self._accelerator.device
        if launched != self.world_size:
            raise LaunchError(
                f"{launched} processes were launched, but this one is in a group of {self.world_size}: they would "
                "train side by side and write over one another. Start them with `torchrun --nproc-per-node N -m rlt2i "
                "train ...`, or unset WORLD_SIZE for a single process."
            )
        self.timeout = timeout
        self.before_collective: Callable[[], None] = _nothing

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Distributed:
        """A process without others; nothing is joined and nothing is imported."""
        this = cls.__new__(cls)
        this._accelerator, this._device, this.timeout = None, torch.device(device), TIMEOUT
        this.before_collective = _nothing
        return this

    @property
    def rank(self) -> int:
        return 0 if self._accelerator is None else int(self._accelerator.process_index)

    @property
    def world_size(self) -> int:
        return 1 if self._accelerator is None else int(self._accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def wait_at_most(self) -> timedelta:
        """How long a process waits for the others."""
        return timedelta(seconds=self.timeout)

    def wait(self) -> None:
        """A barrier.

        Raises:
            ProcessLost: like every collective below, when another process has ended or does not answer.
        """
        if self.world_size > 1:
            self.before_collective()
            with self.together():
                self._accelerator.wait_for_everyone()

    def gather(self, tensor: Tensor) -> Tensor:
        """[B, ...] of every process, concatenated in the order of ranks; B must be the same everywhere."""
        if self.world_size == 1:
            return tensor
        self.before_collective()
        with self.together():
            if tensor.dtype is torch.bool:
                return self._accelerator.gather(tensor.to(torch.uint8)).bool()
            return self._accelerator.gather(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, element by element."""
        if self.world_size == 1:
            return tensor
        self.before_collective()
        with self.together():
            return self._accelerator.reduce(tensor, reduction="sum")

    def mean(self, values: Tensor) -> float:
        """Mean over the finite elements of all processes; nan where there are none."""
        kept = values[torch.isfinite(values)].double()
        total = self.sum(
            torch.stack([kept.sum(), torch.tensor(float(kept.numel()), dtype=torch.float64, device=kept.device)])
        )
        return float(total[0] / total[1]) if total[1] > 0 else float("nan")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return flag if self.world_size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def raise_on_all(self, work: Callable[[], Result], doing: str) -> Result:
        """What `work` returns, once no process has failed at it: so that none waits for one that will not come.

        Args:
            work: called once; where it uses collectives, it must not fail between them on a single process.
            doing: what the others are told that failed, such as "iteration 3".

        Raises:
            OtherProcessFailed: when only others have; the error itself where it happened.
            ProcessLost: at once, where the group itself is broken: there is nobody left to agree with.
        """
        result, error = None, None
        try:
            result = work()
        except ProcessLost:
            raise
        except Exception as caught:
            error = caught
        with because_of(error):
            failed = self.any(error is not None)
        if failed:
            raise telling(error) or OtherProcessFailed(f"{doing}: another process failed; see its message.")
        return result  # type: ignore[return-value]  # there was no error

    def in_step(self, work: Callable[[Callable[[], None]], Result], *, stop: Callable[[], bool], doing: str) -> Result:
        """What `work` returns, with all processes in step: whatever ends it on one ends it on all.

        Args:
            work: called once, with a function that it calls after each piece, equally often on every process.
            stop: asked after each piece; where it holds on any process, none goes on.
            doing: see `raise_on_all`.

        Raises:
            Stopped: on every process alike.
            OtherProcessFailed, ProcessLost: as `raise_on_all`.
        """

        def agree(here: int) -> None:
            worst = here
            if self.world_size > 1:
                worst = int(self.gather(torch.tensor([here], device=self.device)).max())
            if worst == _FAILED > here:
                raise OtherProcessFailed(f"{doing}: another process failed; see its message.")
            if worst == _STOPS:
                raise Stopped

        def step() -> None:
            agree(_STOPS if stop() else _GOES_ON)

        try:
            result = work(step)
        except (Stopped, OtherProcessFailed, ProcessLost):
            raise
        except Exception as error:
            agree(_FAILED)
            telling(error)
            raise
        step()
        return result

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A collective.

        Raises:
            ProcessLost: in place of what it raises when another process has ended or does not answer.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo's connections and torch.distributed's own errors alike
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ProcessLost(
                f"process {self.rank} of {self.world_size} cannot go on: another process has ended, or did not answer "
                f"for {self.timeout:g} seconds ({why}). Look for the first error among the outputs of all processes; "
                "then start again with --resume, which goes on from the last checkpoint."
            ) from error
