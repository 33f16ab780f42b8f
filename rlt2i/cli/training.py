"""Commands that choose, check and train a recipe."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rlt2i.inputs.arguments import check_file

if TYPE_CHECKING:
    from rlt2i.recipes.recipe import Recipe


def list_all(options: argparse.Namespace) -> None:
    """`rlt2i list`."""
    from rlt2i.recipes.catalogue import list_recipes, listing

    for line in listing(list_recipes(), words=options.words, evidence=options.evidence, flat=options.flat):
        print(line)


def doctor(options: argparse.Namespace) -> int:
    """`rlt2i doctor`: 1 when something is broken."""
    from rlt2i.recipes import list_recipes, load_recipe
    from rlt2i.training.doctor import examine, table

    names = options.recipe or [entry.name for entry in list_recipes()]
    recipes = [load_recipe(name, options.set) for name in names]
    findings = examine(recipes, folder=options.run, strict=bool(options.recipe))
    print(table(findings))
    return int(any(finding.verdict == "broken" for finding in findings))


def rehearse(options: argparse.Namespace) -> int:
    """`rlt2i rehearse`: 1 when a recipe failed."""
    import tempfile

    from rlt2i.recipes import list_recipes, load_recipe
    from rlt2i.rehearsal.acts import rehearse as rehearse_recipe

    names = [entry.name for entry in list_recipes()] if options.all else options.recipe
    if not names:
        raise ValueError("rehearse: name a recipe (see `rlt2i list`), or rehearse them --all.")
    failed = []
    for name in names:
        recipe = load_recipe(name, options.set)
        with tempfile.TemporaryDirectory(prefix="rlt2i-rehearsal-") as place:
            folder = options.keep / recipe.name if options.keep else Path(place)
            done = rehearse_recipe(recipe, folder.absolute(), compile_blocks=not options.no_compile)
        print(done.table(), flush=True)
        failed += [] if done.passed else [name]
    print(
        f"{len(names) - len(failed)} of {len(names)} recipes rehearsed"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return int(bool(failed))


def check(options: argparse.Namespace) -> int:
    """`rlt2i check`: 1 when a law is broken."""
    from rlt2i.conformance.command import main, main_of_recipe

    match options.what:
        case ["policy", name]:
            return main(name, options.set, size=options.size, device=options.device, tiny=options.tiny)
        case [name] if name != "policy":
            if options.size:
                raise ValueError("check --size: a recipe says its own size. Use --set train.image_size=...")
            return main_of_recipe(
                name, options.set, device=options.device, world_size=options.processes, tiny=options.tiny
            )
    raise ValueError(f"check {' '.join(options.what)}: say `check RECIPE` or `check policy NAME`.")


def train(options: argparse.Namespace) -> None:
    """`rlt2i train`, on this machine or on Ray, or the plan of it (`--dry-run`)."""
    from rlt2i.recipes import load_recipe
    from rlt2i.runs.names import new_run_dir, newest_run_dir, run_dir_of

    resume: str | None = options.resume
    folder: Path | None = options.run
    resume = "latest" if resume == "auto" else resume
    if resume not in (None, "latest"):
        folder = folder or run_dir_of(Path(resume))
        resume = "latest" if Path(resume) == folder else resume
    if options.recipe is None and not (resume and folder):
        raise ValueError(
            "train: name a recipe (see `rlt2i list`), or continue a run: rlt2i train --run-dir DIR --resume."
        )
    recipe = load_recipe(options.recipe or str(folder), options.set)
    if options.dry_run:
        from rlt2i.training.dry_run import describe_run

        print(describe_run(recipe, world_size=options.processes))
        return
    if folder is None:
        folder = (newest_run_dir(recipe, or_new=options.resume == "auto") if resume else None) or new_run_dir(recipe)
    if options.on == "ray":
        _train_on_ray(options, folder, resume)
    else:
        from rlt2i.training.start import train as train_here

        where = resume if resume in (None, "latest") else Path(resume)
        train_here(recipe, folder, resume=where, accept_changes=options.accept_changes)
    if options.report and os.environ.get("RANK", "0") == "0":
        from rlt2i.report import write_report

        print(f"report: {write_report(folder)}")


def plan(options: argparse.Namespace) -> int:
    """`rlt2i plan`: 1 when the run does not fit the device that was named."""
    from rlt2i.policies.cost import NotCounted
    from rlt2i.recipes import load_recipe
    from rlt2i.training.dry_run import batch_plan, describe_batches, plan_of
    from rlt2i.training.fitting import DoesNotFitError, find_device, fit, overrides, tight_phases, verdict

    recipe = load_recipe(options.recipe, options.set)
    wanted = options.fit or options.gpu
    device = find_device(wanted) if wanted else None
    if options.out and not options.fit:
        raise ValueError(f"plan: --out {options.out} is for the recipe that fits: say --fit DEVICE as well")
    if options.out:
        check_file(options.out)
    print(f"{describe_batches(recipe, world_size=options.processes)}\n", flush=True)  # counting takes a while
    try:
        counted = plan_of(recipe, batch_plan(recipe, world_size=options.processes))
    except (NotCounted, OSError) as error:
        if device is not None:
            raise ValueError(f"plan: {recipe.name} cannot be compared with a device: {error}") from error
        print(f"per process: not counted. {error}")
        return 0
    print(f"per process:\n{counted.table()}")
    if device is None:
        return 0
    print(f"\n{verdict(counted, recipe, device, world_size=options.processes)}")
    if not tight_phases(counted, device):
        _write_recipe(options.out, recipe)
        return 0
    try:
        smaller, fitted = fit(recipe, device, world_size=options.processes, counted=counted)
    except DoesNotFitError as error:
        print(error)
        return 1
    print("\nthe smallest change that makes it fit:")
    changes = [word for change in (*options.set, *overrides(recipe, smaller)) for word in ("--set", change)]
    print(f"  {shlex.join(['rlt2i', 'train', str(options.recipe), *changes])}")
    print(verdict(fitted, smaller, device, world_size=options.processes))
    _write_recipe(options.out, smaller)
    return 0 if options.fit else 1


def _write_recipe(path: Path | None, recipe: Recipe) -> None:
    if path is not None:
        from rlt2i.runs.files import replace_text

        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, recipe.to_yaml())
        print(f"written to {path}")


def _train_on_ray(options: argparse.Namespace, folder: Path, resume: str | None) -> None:
    from rlt2i.training.on_ray import RayRun

    if options.workers is None:
        raise ValueError("train --on ray: how many processes? Give --workers N.")
    if resume not in (None, "latest"):
        raise ValueError(
            f"train --on ray --resume {resume}: on Ray a run goes on from its newest checkpoint, whenever a worker was "
            "lost. Use --resume alone."
        )
    RayRun(
        recipe=options.recipe or str(folder),
        overrides=tuple(options.set),
        run_dir=folder,
        resume=resume,
        workers=options.workers,
        gpus_per_worker=options.gpus_per_worker,
        max_failures=options.max_failures,
    ).start()


def bench(options: argparse.Namespace) -> int:
    """`rlt2i bench`."""
    from rlt2i.bench.command import main

    return main(options.plan, options.rest)


def pretrain(options: argparse.Namespace) -> None:
    """`rlt2i pretrain`: the pipeline of an embedded world."""
    from importlib import import_module

    import_module(f"rlt2i.tasks.{options.task}.pretrain").main(options.rest)
