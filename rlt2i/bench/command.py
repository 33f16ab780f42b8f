"""`rlt2i bench`: run a plan, look at one, or measure without training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlt2i.bench.analysis import power_table, read_results
from rlt2i.bench.lab import run_lab
from rlt2i.bench.page import write_results
from rlt2i.bench.plan import load_plan
from rlt2i.bench.runner import BenchFailed, run_bench


def main(name: str, words: Sequence[str]) -> int:
    """`rlt2i bench NAME ...`; the exit status."""
    return _lab(words) if name == "lab" else _plan(name, words)


def _lab(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rlt2i bench lab",
        description="Gains in signal-to-noise of a linear-Gaussian policy, where theory knows them, and what training "
        "makes of them.",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("bench/lab"), help="default bench/lab")
    parser.add_argument("--batches", type=int, default=300, help="of 32 rollouts, per setting (default 300)")
    parser.add_argument("--seeds", type=int, default=12, help="of the training runs (default 12)")
    options = parser.parse_args(words)
    run_lab(options.out, batches=options.batches, seeds=options.seeds)
    return 0


def _plan(name: str, words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"rlt2i bench {name}",
        description="Trains every arm at every seed, in processes of their own, and compares them seed by seed. Run it "
        "again to go on where it was cut off, or with more --seeds; finished trials are kept.",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default bench/<plan>)")
    parser.add_argument("--jobs", type=int, default=1, help="trials side by side (default 1)")
    parser.add_argument("--seeds", type=int, help="how many (default: as in the plan)")
    parser.add_argument("--set", action="append", default=[], metavar="a=b", help="override a field of the plan")
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--power", action="store_true", help="run nothing; say how many seeds a difference needs")
    look.add_argument("--judge", action="store_true", help="run nothing; write tables and page from what is finished")
    look.add_argument("--dry-run", action="store_true", help="run nothing; check the plan and list its trials")
    options = parser.parse_args(words)
    overrides = [*options.set, *([f"seeds={options.seeds}"] if options.seeds else [])]
    plan = load_plan(name, overrides)
    out = options.out or Path("bench") / plan.name
    if options.dry_run:
        for arm, recipe in plan.recipes().items():
            print(f"{arm:<12} {recipe.name:<24} {recipe.hash[:12]}")
        print(f"{len(plan.trials)} trials: {plan.seeds} seeds of {len(plan.arms)} arms, one evaluation of their start")
        return 0
    if options.power:
        print(power_table(read_results(out, plan)))
        return 0
    if options.judge:
        print(write_results(out, plan))
        return 0
    try:
        print(run_bench(plan, out, jobs=options.jobs))
    except BenchFailed as error:
        print(f"rlt2i bench: {error}")
        return 1
    print(f"page: {out / 'index.html'}")
    return 0
