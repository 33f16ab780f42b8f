"""Which suites there are: those that ship with the package, and YAML files of your own."""

from __future__ import annotations

import contextlib
from pathlib import Path

from rlt2i.config import ConfigError, build, read_yaml, to_mapping
from rlt2i.config.references import did_you_mean
from rlt2i.config.trust import foreign
from rlt2i.evaluation.suites.suite import Suite
from rlt2i.inputs.textfiles import has_suffix, user_path
from rlt2i.recipes.parts import PARTS

FOLDER = Path(__file__).parent


def list_suites() -> list[str]:
    """Names of the suites that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(name_or_path: str | Path, *, trusted: bool = True) -> Suite:
    """A shipped suite by name, or the suite of a YAML file; no prompt is fetched and no weight is read.

    Args:
        name_or_path: which.
        trusted: whether any code that it names may run; see `rlt2i.config.trust`.

    Raises:
        ConfigError: naming the file and the field that is wrong.
    """
    name = str(name_or_path)
    path = FOLDER / f"{name}.yaml" if name in list_suites() else user_path(name)
    if not has_suffix(path, ".yaml", ".yml") or not path.is_file():
        near = did_you_mean(name, list_suites())
        raise ConfigError(f"unknown suite {name!r}{near} Shipped: {', '.join(list_suites())}. Or give a YAML file.")
    try:
        with contextlib.nullcontext() if trusted else foreign(path.parent):
            return build(Suite, read_yaml(path), parts=PARTS, folder=path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def suite_mapping(suite: Suite) -> dict[str, object]:
    """The suite as plain data that `load_suite` reads back."""
    return to_mapping(suite, parts=PARTS, typed=False)
