"""Small runs that train the embedded network as a whole, spread over processes.

    torchrun --nproc-per-node 2 -m tests.helpers.sharded_recipes FOLDER NAME [NAME ...]

trains each of the named runs into FOLDER/NAME, or goes on with it where there is one, and leaves the gradient of every
optimiser step in FOLDER/NAME.gradients, whole, with the sum of the sizes of what it was added up from.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.learner import Learner
from rlt2i.policies.sd3 import SD3Policy
from rlt2i.recipes import Recipe, load_recipe
from rlt2i.training.start import train

RANK = int(os.environ.get("RANK", "0"))
SETTINGS = {
    "policy.guidance_scale": 2.0,  # a pass of its own
    "sampler.num_steps": 2,
    "sampler.window": "[0, 2]",
    "train.iterations": 1,
    "train.prompts_per_iteration": 8,
    "train.group_size": 2,
    "train.rollout_batch_size": 4,
    "train.micro_batch_size": 4,  # one group
    "train.eval_every": 0,
    "train.eval_prompts": 0,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 9,
    "train.ema_decay": 0.5,
    "train.reference": "true",
    "train.trackers": "[]",
    "train.sharding": "full",
}


@attrs.frozen(kw_only=True)
class SometimesRed(Reward):
    """How red an image is; 1/2 whatever it shows for half of the prompts, whose groups so have nothing to learn from.

    Of the eight prompts of the first iteration, one of the first four has something to learn from, and three of the
    others.

    In the run "dies" the second process is gone without a word at its sixth chunk of images, in the third iteration.
    """

    span = (0.0, 1.0)
    seen: list[int] = attrs.field(factory=list, init=False, eq=False)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        self.seen.append(1)
        if RANK == 1 and "dies" in sys.argv and len(self.seen) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        red = batch.images[:, 0].float().mean(dim=(1, 2)) / 255
        blind = torch.tensor([sum(map(ord, prompt)) % 2 == 0 for prompt in batch.prompts])
        scores = torch.where(blind, 0.5, red)
        return RewardOutput(
            scores=scores, valid=torch.ones(len(scores), dtype=torch.bool), components={"strict": scores}
        )


def small(**changes: object) -> Recipe:
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    recipe = load_recipe("star-shapes", overrides=[f"{key}={value}" for key, value in settings.items()])
    return attrs.evolve(recipe, reward=SometimesRed())


def replayed(**changes: object) -> Recipe:
    """Two optimiser steps an iteration, the second from log-probabilities that were replayed."""
    return small(**{"train__optimizer_steps_per_iteration": 2, "train__iterations": 3} | changes)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextlib.contextmanager
def gradients_kept(folder: Path) -> Iterator[None]:
    """Write the gradient of every optimiser step before it is clipped, and how many backward passes it took."""
    plain_step, plain_update, steps = Learner._step, Learner._update, iter(range(99))
    passes: list[int] = []
    sizes: dict[str, Tensor] = {}

    def update(self: Learner, batches: Any, advance: Callable[[int], None], *, on_policy: bool) -> Any:
        passes.clear()
        sizes.clear()
        before: dict[str, Tensor] = {}

        def counted(count: int) -> None:
            passes.append(count)
            if self.reduce_sum is None:  # sizes of what is added up: only asked of a process that has it all
                for name, p in self.policy.trainable_parameters().items():
                    if p.grad is not None:
                        now = p.grad.double()
                        sizes[name] = sizes.get(name, 0) + (now - before.get(name, 0)).abs()
                        before[name] = now.clone()
            advance(count)

        return plain_update(self, batches, counted, on_policy=on_policy)

    def step(self: Learner, norm: Tensor) -> None:
        found = {
            name: whole(p.grad).clone() for name, p in self.policy.trainable_parameters().items() if p.grad is not None
        }
        folder.mkdir(exist_ok=True)
        number = next(steps)
        (folder / f"{number}.passes-{RANK}").write_text(str(len(passes)))
        if RANK == 0:
            save_file(found, folder / f"{number}.safetensors")
            save_file(sizes, folder / f"{number}.sizes.safetensors")
        plain_step(self, norm)

    with patch.object(Learner, "_step", step), patch.object(Learner, "_update", update):
        yield


@contextlib.contextmanager
def fault(act: Callable[[Tensor], Tensor], *, after: int) -> Iterator[None]:
    """On the second process, do something to the velocity of a pass with gradient, once `after` of them were well."""
    plain, seen = SD3Policy.velocity, []

    def velocity(self: Any, *args: Any) -> Tensor:
        found = plain(self, *args)
        if RANK == 1 and torch.is_grad_enabled():
            seen.append(1)
            if len(seen) > after:
                return act(found)
        return found

    with patch.object(SD3Policy, "velocity", velocity):
        yield


def out_of_memory(velocity: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def stop_answering(velocity: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGSTOP)
    return velocity


@contextlib.contextmanager
def silence_inside_a_pass(*, after: int) -> Iterator[None]:
    """On the second process: stopped between two blocks, while the first waits for its part of the next one."""
    from diffusers.models.transformers.transformer_sd3 import JointTransformerBlock

    plain, seen = JointTransformerBlock.forward, []

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(1)
        if RANK == 1 and len(seen) > after:
            os.kill(os.getpid(), signal.SIGSTOP)
        return plain(self, *args, **options)

    with patch.object(JointTransformerBlock, "forward", forward):
        yield


def traced() -> contextlib.AbstractContextManager[Any]:
    """Compile as far as graphs, which run in PyTorch's own kernels, bit for bit: making others takes minutes."""
    return patch.object(torch, "compile", functools.partial(torch.compile, backend="eager"))


RARELY = {"train__checkpoint_every": 9, "train__iterations": 3}
SILENT = {"train__iterations": 3, "train__process_timeout": 45}
RUNS: dict[str, Callable[[], Recipe]] = {
    "plain": small,
    "replayed": replayed,
    "on": replayed,
    "further": lambda: replayed(train__iterations=4),
    "dies": replayed,
    "hybrid": lambda: small(train__sharding="hybrid"),
    "nan": lambda: small(**RARELY),
    "memory": lambda: small(**RARELY),
    "bfloat16": lambda: small(policy__dtype="bfloat16"),
    "compiled": lambda: small(policy__compile="true"),
    "checkpointing": lambda: small(policy__gradient_checkpointing="true"),
    "silent": lambda: small(**SILENT),
    "silent-inside": lambda: small(**SILENT),
}
FAULTS = {
    "compiled": traced,
    "nan": lambda: fault(lambda velocity: velocity * float("nan"), after=4),
    "memory": lambda: fault(out_of_memory, after=4),
    "silent": lambda: fault(stop_answering, after=4),
    "silent-inside": lambda: silence_inside_a_pass(after=100),
}
SAID = ("nan", "memory")
"""Runs after whose end the processes go on to the next together."""


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        if name == "hybrid":
            os.environ["LOCAL_WORLD_SIZE"] = "2"  # as if there were two machines
        run = folder / name
        ended = "ended"
        with gradients_kept(folder / f"{name}.gradients"), FAULTS.get(name, contextlib.nullcontext)():
            try:
                train(RUNS[name](), run, resume="latest" if run.exists() else None)
            except Exception as error:
                if name not in SAID:
                    raise
                ended = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"<{RANK}|{name}|{ended}>", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
