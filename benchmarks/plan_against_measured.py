"""What `rlt2i plan` counts against what an iteration takes, on the CPU, for pipelines small enough to run there.

python -m benchmarks.plan_against_measured

An iteration is run whole, its decoding and judging in other threads included, while every storage that an operation
makes is added up as long as it lives: the memory that a device's allocator would have to have. It is the second
iteration, since an optimiser has no state before its first step. What is kept in host memory on purpose (the copy to
which a refused update goes back) is left out; text encoders stay on the device. A device's kernels take workspaces,
and its allocator rounds up: `rlt2i plan` adds a tenth for them, and this cannot show whether that is enough.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from rlt2i import learner
from rlt2i.config import apply_overrides
from rlt2i.distributed import Distributed
from rlt2i.recipes import load_recipe
from rlt2i.recipes.recipe import Recipe, recipe_from_mapping
from rlt2i.rehearsal.replacing import make_small
from rlt2i.rewards.beside import Beside
from rlt2i.tasks.base import as_prompts
from rlt2i.training.dry_run import batch_plan, plan_of
from rlt2i.training.signals import GracefulStop
from rlt2i.training.start import assemble

CASES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "embedded": ("star-cells", ("train.prompts_per_iteration=4",)),
    "embedded, two steps, small chunks": (
        "star-cells",
        ("train.prompts_per_iteration=4", "train.rollout_batch_size=8", "train.micro_batch_size=8"),
    ),
    "SD3 tiny": ("star-sd35-ocr", ()),
    "FLUX tiny": ("flow-grpo-flux1-ocr", ("policy.text_encoders=device",)),
}
"""Name -> (recipe, overrides); recipes of large models are made as small as a rehearsal makes them."""
PHASES = ("encode", "rollout", "update")


@attrs.define
class Ledger:
    """Adds up the storages that are alive, whichever thread made them."""

    live: int = 0
    peak: int = 0
    _known: dict[int, Any] = attrs.field(factory=dict)
    _lock: Any = attrs.field(factory=threading.RLock)

    def enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()

        def leave(_: Any) -> None:
            with self._lock:
                del self._known[key]
                self.live -= size

        with self._lock:
            if key not in self._known:
                self._known[key] = weakref.ref(storage, leave)
                self.live += size
                self.peak = max(self.peak, self.live)

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[None]:
        """Watch this thread, and the work that a rollout hands to others."""
        hand_in, copied = Beside.hand_in, learner._copied

        def watched(beside: Any, job: Callable[[], Any]) -> None:
            def work() -> Any:
                with _Watch(self):
                    return job()

            hand_in(beside, work)

        def to_host(value: Any) -> Any:
            with _disable_current_modes():
                return copied(value)

        with (
            mock.patch.object(Beside, "hand_in", watched),
            mock.patch.object(learner, "_copied", to_host),
            _Watch(self),
        ):
            yield


class _Watch(TorchDispatchMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.ledger.enter(value)
        return out


def small_recipe(name: str, overrides: Sequence[str], folder: Path) -> Recipe:
    """A recipe that runs here, with the overrides; those of `train` are of the small one."""
    recipe = load_recipe(name)
    if not getattr(recipe.policy, "path", "").startswith("embedded:"):
        recipe = make_small(recipe, folder, compile_blocks=False).recipe
    return recipe_from_mapping(apply_overrides(recipe.mapping(), list(overrides)))


def measure(recipe: Recipe, folder: Path) -> dict[str, int]:
    """Phase -> bytes at its peak, in the second iteration."""
    ledger, algorithm = Ledger(), recipe.algorithm().load("cpu")
    policy: Any = algorithm.policy
    pipe = getattr(policy, "policy", policy).pipe
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            for tensor in (*part.parameters(), *part.buffers()):
                ledger.enter(tensor)
    peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        ledger.peak = ledger.live
        yield
        peaks[name] = ledger.peak

    with ledger.everywhere():
        trainer = assemble(recipe, algorithm, folder, None, Distributed.alone("cpu"), lambda _: None, GracefulStop())
        stream = recipe.task.train_prompts(seed=0, start=0, count=recipe.train.prompts_per_iteration)
        prompts = as_prompts(stream, group_size=recipe.train.group_size)
        for iteration in range(2):
            with phase("encode"):
                trainer.policy.encode(prompts)
            with phase("rollout"), trainer.learner.sets.use(trainer.learner.objective.rollout_weights):
                collected = trainer.engine.collect(prompts, iteration=iteration)
            with phase("update"):
                trainer.learner.learn(collected.experience)
            del collected
    return peaks


def compare(name: str, overrides: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Phase -> (counted, measured) bytes."""
    with tempfile.TemporaryDirectory() as place:
        recipe = small_recipe(name, overrides, Path(place))
        counted = plan_of(recipe, batch_plan(recipe, world_size=1)).memory
        measured = measure(recipe, Path(place) / "run")
    return {phase: (counted[phase], measured[phase]) for phase in PHASES}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="counted against measured memory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_against_measured.csv"))
    options = parser.parse_args()
    lines = ["case,recipe,phase,counted_bytes,measured_bytes,ratio"]
    for case, (name, overrides) in CASES.items():
        for phase, (counted, measured) in compare(name, overrides).items():
            lines.append(f'"{case}",{name},{phase},{counted},{measured},{counted / measured:.3f}')
            print(lines[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
