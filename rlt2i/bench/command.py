"""`rlt2i bench`: run a plan, look at one, or measure without training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch

from rlt2i.bench.analysis import power_table, read_results
from rlt2i.bench.folder import csv_text
from rlt2i.bench.lab import run_lab
from rlt2i.bench.page import write_results
from rlt2i.bench.plan import load_plan
from rlt2i.bench.probe import Probe
from rlt2i.bench.probe_rows import COLUMNS as PROBE_COLUMNS
from rlt2i.bench.probe_rows import table
from rlt2i.bench.publish import publish
from rlt2i.bench.runner import BenchFailed, run_bench
from rlt2i.recipes.recipe import load_recipe
from rlt2i.runs.files import replace_text


def main(name: str, words: Sequence[str]) -> int:
    """`rlt2i bench NAME ...`; the exit status."""
    return {"lab": _lab, "probe": _probe}[name](words) if name in ("lab", "probe") else _plan(name, words)


def _probe(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rlt2i bench probe",
        description="Measures a recipe's credit and its controls on the same rollouts of fixed weights, "
        "without training: where maps lie, what redrawn noise does, signal and noise of gradients. "
        "Takes a recipe with one map over places.",
    )
    parser.add_argument("recipe", help="name, YAML file or run directory")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field of the recipe")
    parser.add_argument("--checkpoint", action="append", type=Path, default=[], metavar="DIR", help="also there")
    parser.add_argument("--batches", type=int, default=100, help="for maps and gradients (default 100)")
    parser.add_argument("--interventions", type=int, default=10, help="batches of completed steps and redrawn noise")
    parser.add_argument("--prompts", type=int, default=4, help="of a batch (default 4)")
    parser.add_argument("--group-size", type=int, default=8, help="rollouts per prompt (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("bench/probe.csv"), help="default bench/probe.csv"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep finished batches there, and go on from them when run again"
    )
    options = parser.parse_args(words)
    run = Probe.of(
        load_recipe(options.recipe, options.set),
        prompts=options.prompts,
        group_size=options.group_size,
        seed=options.seed,
        device=options.device,
    )
    rows = []
    for checkpoint in (None, *options.checkpoint):
        if checkpoint is not None:
            run.use_weights(checkpoint)
        weights = checkpoint.name if checkpoint else "base"
        kept = options.keep / weights if options.keep else None
        rows += run.measure(weights, batches=options.batches, interventions=options.interventions, folder=kept)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.out, csv_text(PROBE_COLUMNS, [attrs.astuple(row) for row in rows]))
    print(table(rows))
    print(options.out)
    return 0


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
    parser.add_argument(
        "--reuse",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="take finished trials of the same recipes and seeds from another benchmark's folder",
    )
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--power", action="store_true", help="run nothing; say how many seeds a difference needs")
    look.add_argument("--judge", action="store_true", help="run nothing; write tables and page from what is finished")
    look.add_argument("--dry-run", action="store_true", help="run nothing; check the plan and list its trials")
    look.add_argument(
        "--publish", type=Path, metavar="DIR", help="run nothing; write small tables fit for a repository"
    )
    parser.add_argument("--bands", type=Path, metavar="DIR", help="with --publish: also write reference bands there")
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
    if options.publish:
        print(publish(out, plan, options.publish, bands=options.bands))
        return 0
    try:
        print(run_bench(plan, out, jobs=options.jobs, reuse=options.reuse))
    except BenchFailed as error:
        print(f"rlt2i bench: {error}")
        return 1
    print(f"page: {out / 'index.html'}")
    return 0
