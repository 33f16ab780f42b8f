"""The command line that the pretraining of every embedded world shares."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import torch

from rlt2i.tasks.embedded.pretraining import Schedule

Pretrain = Callable[..., object]
"""(out_dir, schedule, seed=, compile_blocks=)."""


def run_command(
    pretrain: Pretrain, schedule: Schedule, arguments: Sequence[str] | None, *, world: str, about: str | None
) -> None:
    """Read the options of `rlt2i pretrain WORLD` and train.

    Args:
        pretrain: of the world.
        schedule: its default.
        arguments: None reads those of the process.
        about: what `--help` says.
    """
    parser = argparse.ArgumentParser(prog=f"rlt2i pretrain {world}", description=about)
    parser.add_argument("--out", type=Path, required=True, help="pipeline directory to write")
    parser.add_argument("--steps", type=int, default=schedule.steps, help="updates at most (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--target", type=float, default=schedule.target, help="strict score to stop at; 1 trains to the end "
        "(default %(default)s)"
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the transformer blocks")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chosen = attrs.evolve(schedule, steps=options.steps, target=options.target)
    pretrain(options.out, chosen, seed=options.seed, compile_blocks=not options.no_compile)
