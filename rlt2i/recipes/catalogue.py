"""What recipes there are, found without importing any part."""

from __future__ import annotations

from pathlib import Path

import attrs

from rlt2i.config import ConfigError, read_yaml
from rlt2i.config.references import did_you_mean, is_reference

FOLDER = Path(__file__).parent / "library"


@attrs.frozen(kw_only=True)
class RecipeEntry:
    """One line of `rlt2i list`."""

    name: str
    about: str
    evidence: str
    path: Path


def list_recipes() -> list[RecipeEntry]:
    """The recipes that ship with the package, by name."""
    entries = []
    for path in shipped().values():
        mapping = read_yaml(path)
        words = {field: str(mapping.get(field, "")) for field in ("name", "about", "evidence")}
        entries.append(RecipeEntry(path=path, **words))
    return entries


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
    path = Path(name_or_path)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.suffix in {".yaml", ".yml", ".json"}:
        if not path.is_file():
            raise ConfigError(f"{path}: no such recipe file.")
        return path
    if is_reference(name_or_path):
        return name_or_path
    raise ConfigError(
        f"unknown recipe {name_or_path!r}{did_you_mean(name_or_path, files)} Shipped: {', '.join(files)}. "
        "Or give a YAML file, a run directory, or module:function."
    )
