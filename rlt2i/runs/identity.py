"""What a run reads besides its recipe: data files and the code of parts from elsewhere, by path and SHA-256."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from rlt2i.config.references import is_reference
from rlt2i.config.trust import is_ours_or_installed, remember
from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.files import sha256
from rlt2i.tasks.base import Task

Inputs = dict[str, dict[str, str]]
"""Field of the recipe -> {"path": absolute, "sha256": hexadecimal}."""

_NOT_IDENTITY = ("heldout",)
"""Parts that cannot change the training."""


def inputs_of(recipe: Recipe) -> Inputs:
    """Every file that a field of the recipe names, and the module of every part that is not this package's.

    Installed packages are known by their versions and left out.

    Returns:
        By dotted field; code is called "field (module)". Files that a task's data name (the images of pairs) are one
        entry together: their folder, and the SHA-256 over the SHA-256 of each.
    """
    inputs = {name: {"path": str(path), "sha256": sha256(path)} for name, path in _named_files(recipe)}
    for name, task in _tasks(recipe.task, "task"):
        if files := task.further_files():
            digest = hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()
            inputs[f"{name} (files named in its data)"] = {"path": str(Path(files[0]).parent), "sha256": digest}
    return inputs


def remember_code(recipe: Recipe) -> None:
    """This user runs the recipe, so its run directory may name this code again; see `rlt2i.config.trust`."""
    files_by_part = [_files(getattr(recipe, field.name), field.name) for field in attrs.fields(type(recipe))]
    code = [path for files in files_by_part for name, path in files if name.endswith(")")]
    around = [folder / "__init__.py" for path in code for folder in path.parents]
    remember([*code, *(path for path in around if path.is_file() and not is_ours_or_installed(path))])


def _tasks(task: Task, field: str) -> Iterator[tuple[str, Task]]:
    yield field, task
    kind: type = type(task)
    if attrs.has(kind):
        for part in attrs.fields(kind):
            if isinstance(inner := getattr(task, part.name), Task):
                yield from _tasks(inner, f"{field}.{part.name}")


def file_fields(recipe: Recipe) -> dict[str, Path]:
    """Dotted field -> the data file it names."""
    return {name: path for name, path in _named_files(recipe) if not name.endswith(")")}


def _named_files(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    for field in attrs.fields(type(recipe)):
        if field.name not in _NOT_IDENTITY:
            yield from _files(getattr(recipe, field.name), field.name)


def read_inputs(file: Path) -> Inputs | None:
    """What `inputs_of` gave when the run was started; None where that was not written down.

    Raises:
        ValueError: when the file is damaged.
    """
    if not file.is_file():
        return None
    try:
        inputs: Inputs = json.loads(file.read_text(encoding="utf-8"))
        for entry in inputs.values():
            entry["path"], entry["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: damaged ({error}), so it is unknown which data the run was started with. Delete it to go on with "
            "the data that are there now."
        ) from error
    return inputs


def changes(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What differs in content, in words; a file that was only moved does not."""
    words = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if new is None and old is not None:
            words.append(f"{name}: {old['path']} is not read any more, or not there")
        elif old is None and new is not None:
            words.append(f"{name}: {new['path']} was not read before")
        elif old is not None and new is not None and old["sha256"] != new["sha256"]:
            moved = "" if old["path"] == new["path"] else f", read from {new['path']}"
            words.append(
                f"{name}: {old['path']} has other content ({old['sha256'][:8]} then, {new['sha256'][:8]} now{moved})"
            )
    return words


def _files(value: Any, field: str) -> Iterator[tuple[str, Path]]:
    if isinstance(value, str | Path):
        if path := _file(value):
            yield field, path
        elif isinstance(value, str) and is_reference(value):
            name = value.rpartition(":")[0]
            code = _file(name if name.endswith(".py") else getattr(sys.modules.get(name), "__file__", None) or "")
            if code is not None and not is_ours_or_installed(code):
                yield f"{field} ({code.name if name.endswith('.py') else name})", code
    elif attrs.has(type(value)):
        yield from ((f"{field} ({module})", path) for module, path in _code(type(value)))
        for part in attrs.fields(type(value)):
            if part.init:
                yield from _files(getattr(value, part.name), f"{field}.{part.alias or part.name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _files(item, f"{field}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _files(item, f"{field}[{i}]")


def _file(value: str | Path) -> Path | None:
    if not str(value) or len(str(value)) > 4096 or "\0" in str(value):
        return None
    try:
        path = Path(value).expanduser()
        return path.resolve() if path.is_file() else None
    except (OSError, RuntimeError):  # a text that is no path at all
        return None


def _code(cls: type) -> Iterator[tuple[str, Path]]:
    """(module, file) of a class and its bases, as far as they are neither ours nor installed."""
    for name in dict.fromkeys(base.__module__ for base in cls.__mro__):
        file = getattr(sys.modules.get(name), "__file__", None)
        path = Path(file).resolve() if file else None
        if path is not None and path.is_file() and not is_ours_or_installed(path):
            yield (path.name if name.startswith("rlt2i_file_") else name), path
