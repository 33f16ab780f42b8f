"""STAR's maps against uniform, shuffled and oracle credit: equal samples, paired seeds, one objective.

Arms of one seed share prompts, initial noise and held-out noise; they differ in the weights of the credit alone.
Writes a CSV, a plot and an honest sentence.

    python -m benchmarks.credit_comparison --objective nft --seeds 3 --iterations 16
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import attrs

from rlt2i.credit.algebra import Allocation, Product
from rlt2i.credit.controls import Inverted, Oracle, Shuffled
from rlt2i.recipes import Recipe, load_recipe
from rlt2i.report import compare_runs

BASE = {"nft": "star-nft-shapes", "clipped": "star-shapes"}
ARMS = ("star", "uniform", "shuffled", "oracle")


def recipe_of(objective: str, arm: str, *, seed: int, iterations: int, every: int) -> Recipe:
    """The star recipe of an objective, with the arm's allocation in place of the map."""
    recipe = load_recipe(BASE[objective])
    credit = recipe.credit
    assert isinstance(credit, Product)
    (attention,) = credit.allocations
    allocations: dict[str, tuple[Allocation, ...]] = {
        "star": (attention,),
        "uniform": (),
        "shuffled": (Shuffled(allocation=attention),),
        "inverted": (Inverted(allocation=attention),),
        "oracle": (Oracle(mix=attention.mix),),  # type: ignore[attr-defined]
    }
    train = attrs.evolve(recipe.train, seed=seed, iterations=iterations, eval_every=every, checkpoint_every=iterations)
    train = attrs.evolve(train, eval_steps=10)  # half the recipe's: what differs between arms is what matters here
    return attrs.evolve(
        recipe,
        name=f"{arm}-{objective}",
        credit=attrs.evolve(credit, allocations=allocations[arm]),
        train=attrs.evolve(train, keep_checkpoints=1, trackers=(), reference=False),
    )


def run_all(objective: str, arms: list[str], seeds: list[int], options: argparse.Namespace) -> None:
    """Every arm and seed in a process of its own, `options.workers` at a time; finished runs are kept."""
    waiting = [(arm, seed) for seed in seeds for arm in arms]
    running: list[tuple[subprocess.Popen, str]] = []
    started = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < options.workers:
            arm, seed = waiting.pop(0)
            folder = options.runs / f"{arm}-{objective}-{seed}"
            if (folder / f"checkpoint-{options.iterations:08d}").exists():
                continue
            shutil.rmtree(folder, ignore_errors=True)
            command = [sys.executable, "-m", "benchmarks.credit_comparison", "--objective", objective, "--only", arm]
            command += ["--seed", str(seed), "--iterations", str(options.iterations), "--every", str(options.every)]
            command += ["--runs", str(options.runs)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
            running.append((subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL), f"{arm} {seed}"))
        for process, name in list(running):
            if process.poll() is not None:
                running.remove((process, name))
                seconds = time.perf_counter() - started
                print(f"{objective} {name}: exit {process.returncode}, {seconds:.0f} s", flush=True)
                if process.returncode:
                    raise SystemExit(f"{name} failed")
        time.sleep(0.5)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="compare credits at equal samples")
    parser.add_argument("--objective", choices=[*BASE], default="nft")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", help="train one arm (used by the benchmark itself)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.only:
        from rlt2i.training.start import train

        recipe = recipe_of(
            options.objective, options.only, seed=options.seed, iterations=options.iterations, every=options.every
        )
        train(recipe, options.runs / f"{options.only}-{options.objective}-{options.seed}")
        return
    seeds = list(range(options.seeds))
    run_all(options.objective, options.arms, seeds, options)
    folders = {arm: [options.runs / f"{arm}-{options.objective}-{s}" for s in seeds] for arm in options.arms}
    comparison = compare_runs(folders, options.out / f"credit_{options.objective}", baseline="uniform")
    print(comparison.sentence)


if __name__ == "__main__":
    main()
