"""A reward that may take so long and no longer."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import attrs
import torch
from attrs import validators

from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.rewards.batching import failed
from rlt2i.rewards.wrapper import Wrapper


@attrs.frozen(kw_only=True)
class Deadline(Wrapper):
    """Another reward in this process, whose images are invalid when it does not answer in time.

    Code that runs cannot be stopped from outside within one process, so a call that is late goes on in its own thread
    and what it returns is dropped. Until it ends the reward is not called again (it may not be made for two calls at
    once): the next batch waits for it within its own time, and is invalid when it still hangs. A call that never ends
    makes every batch invalid from then on, so that the run stops with this reason and what was learned is saved.
    Rewards on servers have time-outs of their own (`timeout_s`), and can be started anew there.

    Attributes:
        reward: the one inside.
        seconds: for one batch, those that an earlier call still takes included.
    """

    seconds: float = attrs.field(validator=[validators.gt(0.0), validators.le(threading.TIMEOUT_MAX)])
    _late: list[_Call] = attrs.field(factory=list, init=False, eq=False, repr=False)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        give_up = time.monotonic() + self.seconds
        for call in tuple(self._late):
            if not call.wait(give_up):
                return failed(len(batch.prompts), f"an earlier call still hangs, {self.seconds:g} s after its time")
            with contextlib.suppress(ValueError):  # another thread saw it first
                self._late.remove(call)
        call = _Call(functools.partial(self.reward.score, batch, want))
        if not call.wait(give_up):
            self._late.append(call)
            return failed(len(batch.prompts), f"no answer within {self.seconds:g} s")
        output: RewardOutput = call.result()
        return output

    def fingerprint(self) -> dict[str, Any]:
        return self.reward.fingerprint()


class _Call:
    """A call in a thread that does not keep the process alive, under the caller's gradient mode and device."""

    def __init__(self, work: Callable[[], RewardOutput]) -> None:
        self._work = work
        self._output: Any = None
        self._error: BaseException | None = None
        self._gradient = torch.is_grad_enabled()
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._over = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="reward with a deadline").start()

    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            with torch.set_grad_enabled(self._gradient):
                self._output = self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._over.set()

    def wait(self, until: float) -> bool:
        """Whether the call is over by then."""
        return self._over.wait(max(0.0, until - time.monotonic()))

    def result(self) -> Any:
        """What it returned; or raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._output
