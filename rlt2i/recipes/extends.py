"""A recipe file that says only what it changes: `extends: NAME`, the name of a shipped recipe.

Fields that are not mentioned are those of the other recipe. A mapping with a `type` is a part written whole and
replaces the other's; a mapping without one changes single fields; lists and plain values replace. What a recipe says of
itself (name, about, evidence) is never inherited. Neither the resolved recipe of a run nor its hash knows of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlt2i.config import ConfigError, read_yaml
from rlt2i.config.references import did_you_mean
from rlt2i.recipes.catalogue import shipped

OWN = ("name", "about", "evidence")
"""What a recipe says of itself."""


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping of a recipe file, with what it leaves to another recipe filled in.

    Raises:
        ConfigError: when it extends a recipe that does not ship or that extends another one, or does not say its name.
    """
    mapping = read_yaml(path)
    if "extends" not in mapping:
        return mapping
    name = mapping.pop("extends")
    files = shipped()
    if name not in files:
        raise ConfigError(
            f"{path}: extends: no shipped recipe is called {name!r}{did_you_mean(str(name), files)} `rlt2i list` shows "
            "them; or write the recipe whole."
        )
    below = read_yaml(files[name])
    if "extends" in below:
        raise ConfigError(
            f"{path}: extends: {name} itself extends {below['extends']}. Extend that one, so that a recipe is read in "
            "two files at most."
        )
    missing = [word for word in OWN if word not in mapping]
    if missing:
        raise ConfigError(f"{path}: {missing[0]}: a recipe that extends another one says this of itself.")
    return _changed({key: value for key, value in below.items() if key not in OWN}, mapping)


def _changed(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(below)
    for key, value in above.items():
        under = below.get(key)
        fields = isinstance(value, Mapping) and isinstance(under, Mapping) and "type" not in value
        changed[key] = _changed(under, value) if fields else value  # type: ignore[arg-type]
    return changed
