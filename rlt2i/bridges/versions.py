"""Whether an engine that is installed has the extension points that a bridge uses."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any


def extension_points(engine: str, module: str, names: Iterable[str], *, since: str) -> list[Any]:
    """The named attributes of a module of an engine; a dotted name is an attribute of an attribute.

    Args:
        engine: name of the engine's package, whose `__version__` the message quotes.
        module: where the extension points are.
        names: of the extension points.
        since: the first version known to have them all, and how to get it.

    Raises:
        ImportError: naming what is missing, the version that was found and the one that has it.
    """
    try:
        target: Any = importlib.import_module(module)
        missing = ""
    except ImportError as error:
        if error.name and not (module == error.name or module.startswith(error.name + ".")):
            raise  # the engine is there; something that it imports is not
        target, missing = None, module
    points: list[Any] = []
    for name in names if target is not None else ():
        point = target
        for part in name.split("."):
            point = getattr(point, part, None)
        if point is None:
            missing = f"{module}.{name}"
            break
        points.append(point)
    if missing:
        raise ImportError(f"the {engine} bridge plugs into {missing}, which {_installed(engine)}. Use {since}.")
    return points


def _installed(engine: str) -> str:
    try:
        version = getattr(importlib.import_module(engine), "__version__", None)
    except ImportError:
        return f"cannot be imported: {engine} is not installed"
    return f"the installed {engine} {version or '(of unknown version)'} lacks"
