"""Which directory a run lives in."""

from __future__ import annotations

import os
from pathlib import Path

from rlt2i.config import ConfigError
from rlt2i.recipes.recipe import Recipe

RUNS = Path("runs")


def run_name(recipe: Recipe) -> str:
    """<recipe>-<first 8 of its hash>-s<seed>."""
    return f"{recipe.name}-{recipe.hash[:8]}-s{recipe.train.seed}"


def new_run_dir(recipe: Recipe, root: Path = RUNS) -> Path:
    """A directory that does not exist yet; a repetition of the same recipe gets a number at the end.

    Raises:
        ConfigError: when several processes would each have to choose.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("name the run directory with --run-dir DIR, so that all processes use the same one.")
    name = run_name(recipe)
    number = 1
    while (path := root / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def newest_run_dir(recipe: Recipe, root: Path = RUNS, *, or_new: bool = False) -> Path | None:
    """The latest run of exactly this recipe.

    Args:
        or_new: None where there is no run, instead of an error.

    Raises:
        ConfigError: when there is none, naming the runs of the same name with other settings.
    """
    name = run_name(recipe)
    runs = [path for path in root.glob(f"{name}*") if path.is_dir() and _number(path.name, name) is not None]
    if runs:
        return max(runs, key=lambda path: _number(path.name, name) or 0)
    if or_new:
        return None
    others = sorted(path.name for path in root.glob(f"{recipe.name}-*") if (path / "recipe.yaml").is_file())
    near = (
        f" Runs of {recipe.name} with other settings: {', '.join(others)}; continue one with --run-dir."
        if others
        else ""
    )
    raise ConfigError(f"--resume: there is no run {root / name} to continue.{near}")


def run_dir_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint lies in; a run directory is its own.

    Raises:
        ConfigError: when the path is in no run directory.
    """
    for folder in (checkpoint, *checkpoint.parents[:2]):
        if (folder / "recipe.yaml").is_file():
            return folder
    raise ConfigError(
        f"--resume {checkpoint}: neither a run directory nor a checkpoint in one. To continue the newest run of a "
        "recipe, write the recipe first: rlt2i train RECIPE --resume."
    )


def _number(name: str, stem: str) -> int | None:
    """1 for the stem itself, n for <stem>-n, None for anything else."""
    if name == stem:
        return 1
    tail = name.removeprefix(f"{stem}-")
    return int(tail) if name.startswith(f"{stem}-") and tail.isdigit() else None
