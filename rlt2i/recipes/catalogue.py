"""What recipes there are, found without importing any part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from rlt2i.config import ConfigError, read_yaml
from rlt2i.config.references import did_you_mean, is_reference
from rlt2i.inputs.textfiles import has_suffix, user_path

FOLDER = Path(__file__).parent / "library"


@attrs.frozen(kw_only=True)
class RecipeEntry:
    """One line of `rlt2i list`."""

    name: str
    about: str
    evidence: str
    path: Path
    model: str = ""


EVIDENCE = {
    "gated": "a committed curve that a test re-checks",
    "curve": "the curve of a full run is committed",
    "smoke": "runs",
    "rehearsed": "ran on a tiny model of the same classes",
    "unrun": "never run with its real weights",
}
"""Levels of evidence, the strongest first."""


def list_recipes() -> list[RecipeEntry]:
    """The recipes that ship with the package, by name."""
    mappings = {name: read_yaml(path) for name, path in shipped().items()}
    entries = []
    for name, mapping in mappings.items():
        words = {field: str(mapping.get(field, "")) for field in ("name", "about", "evidence")}
        policies = [mapping.get("policy"), mappings.get(mapping.get("extends", ""), {}).get("policy")]
        model = next((policy["path"] for policy in policies if isinstance(policy, dict) and "path" in policy), "")
        entries.append(RecipeEntry(path=shipped()[name], model=str(model), **words))
    return entries


def listing(
    entries: Sequence[RecipeEntry], *, words: Sequence[str] = (), evidence: Sequence[str] = (), flat: bool = False
) -> Iterator[str]:
    """The lines of `rlt2i list`: recipes by model, those with the strongest evidence first.

    Args:
        entries: of `list_recipes`.
        words: only recipes that hold each of them in name, model, evidence or description.
        evidence: only these levels; empty means all.
        flat: one line a recipe, by name, without headings.

    Raises:
        ConfigError: for a level that does not exist, or when nothing is left.
    """
    for word in evidence:
        if word not in EVIDENCE:
            raise ConfigError(f"--evidence {word}{did_you_mean(word, EVIDENCE)} Levels: {', '.join(EVIDENCE)}.")
    chosen = [
        entry
        for entry in entries
        if (not evidence or entry.evidence in evidence)
        and all(word.lower() in f"{entry.name} {entry.model} {entry.evidence} {entry.about}".lower() for word in words)
    ]
    if not chosen:
        raise ConfigError(
            f"no recipe matches {' '.join([*words, *evidence])!r}. `rlt2i list` shows all {len(entries)}."
        )
    wide, level = (max(len(getattr(entry, field)) for entry in chosen) for field in ("name", "evidence"))
    if flat:
        yield from (f"{entry.name:<{wide}}  {entry.evidence:<{level}}  {entry.about}" for entry in chosen)
        return
    for number, model in enumerate(sorted({entry.model for entry in chosen}, key=lambda m: (":" not in m, m))):
        members = [entry for entry in chosen if entry.model == model]
        yield f"{chr(10) * bool(number)}{model or 'other models'} ({len(members)})"
        for word, meaning in EVIDENCE.items():
            group = [entry for entry in members if entry.evidence == word]
            yield from [f"  {word}: {meaning}"] if group else []
            yield from (f"    {entry.name:<{wide}}  {entry.about}" for entry in group)


def _no_such_path(name: str) -> str:
    """What to say of a path that is no run directory: what is there, or what is near."""
    path = Path(name)
    if path.is_dir():
        inside = sorted(run.name for run in path.iterdir() if (run / "recipe.yaml").is_file())
        held = f" It holds runs: {', '.join(inside[:5])}." if inside else ""
        return f"{path}: is no run directory, since it has no recipe.yaml.{held}"
    parent = next((p for p in path.parents if p.is_dir()), Path())
    runs = sorted(str(run.parent) for run in parent.glob("*/recipe.yaml"))
    near = did_you_mean(name, runs)
    there = f" Runs in {parent}: {', '.join(Path(run).name for run in runs[:5])}." if runs else ""
    return f"{path}: no such run directory or recipe file{near}{there} Relative paths start at {Path.cwd()}."


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that ship with the package."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def find_recipe(name_or_path: str) -> Path | str:
    """The file of a recipe, or the `module:function` reference of a Python one.

    Raises:
        ConfigError: when there is no such recipe.
    """
    files = shipped()
    if name_or_path in files:
        return files[name_or_path]
    path = user_path(name_or_path)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if has_suffix(path, ".yaml", ".yml", ".json"):
        if not path.is_file():
            raise ConfigError(f"{path}: no such recipe file.")
        return path
    if is_reference(name_or_path):
        return name_or_path
    if path.is_dir() or len(path.parts) > 1 or name_or_path.startswith((".", "~")):
        raise ConfigError(_no_such_path(str(path)))
    near = did_you_mean(name_or_path, files)
    if (Path("runs") / path / "recipe.yaml").is_file():
        near = f"; did you mean 'runs/{path}'?"
    raise ConfigError(
        f"unknown recipe {name_or_path!r}{near} Shipped: {len(files)} recipes, which `rlt2i list` shows. "
        "Or give a YAML file, a run directory, or module:function."
    )
