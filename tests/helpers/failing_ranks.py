"""Two processes, of which one fails somewhere: torchrun -m tests.helpers.failing_ranks FOLDER.

Prints, for every scenario and process, what ended the run. Processes go on to the next scenario together, so none waits
for one that will not come.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from rlt2i.evaluation.draw import Draw
from rlt2i.runs import checkpoint
from rlt2i.runs.runlog import RunLog
from rlt2i.training.start import train
from tests.helpers import toy_recipe
from tests.helpers.toy import ToyPolicy

RANK = int(os.environ["RANK"])


@contextlib.contextmanager
def acting(owner: Any, name: str, act: Callable[[], None], *, rank: int, when: Callable[[], bool]) -> Iterator[None]:
    """On one process, do something before a method when a condition holds."""
    plain = getattr(owner, name)

    def method(*args: Any, **options: Any) -> Any:
        if rank == RANK and when():
            act()
        return plain(*args, **options)

    with patch.object(owner, name, method):
        yield


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def not_a_number(*, rank: int) -> Iterator[None]:
    """On one process, every velocity with a gradient is NaN."""
    plain = ToyPolicy.velocity

    def velocity(self: ToyPolicy, *args: Any) -> torch.Tensor:
        found = plain(self, *args)
        return found * float("nan") if rank == RANK and torch.is_grad_enabled() else found

    with patch.object(ToyPolicy, "velocity", velocity):
        yield


def main(folder: Path) -> None:
    settings = {"iterations": 2, "eval_prompts": 8, "eval_steps": 2, "rollout_batch_size": 2, "checkpoint_every": 1}
    calls: list[int] = []

    def later() -> bool:
        calls.append(1)
        return len(calls) == 3

    scenarios: dict[str, contextlib.AbstractContextManager[None]] = {
        "sampling": acting(ToyPolicy, "velocity", out_of_memory, rank=1, when=lambda: not torch.is_grad_enabled()),
        "learning": acting(ToyPolicy, "velocity", out_of_memory, rank=1, when=torch.is_grad_enabled),
        "not a number": not_a_number(rank=1),
        "evaluating, at once": acting(Draw, "judged", out_of_memory, rank=1, when=lambda: True),
        "evaluating, later": acting(ToyPolicy, "velocity", out_of_memory, rank=1, when=later),
        "logging": acting(RunLog, "log", disk_full, rank=0, when=lambda: True),
        "saving": acting(checkpoint, "save_tensors", disk_full, rank=0, when=lambda: True),
        "stopping": acting(ToyPolicy, "velocity", terminated, rank=1, when=later),
    }
    for name, fault in scenarios.items():
        calls.clear()
        evaluates = name in ("evaluating, at once", "evaluating, later", "stopping")
        recipe = toy_recipe.clipped(**settings | ({} if evaluates else {"eval_prompts": 0}))
        with fault:
            try:
                train(recipe, folder / name.replace(", ", "-").replace(" ", "-"))
                ended = "ended"
            except Exception as error:
                ended = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"<{RANK}|{name}|{ended}>", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
