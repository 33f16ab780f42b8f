"""Which UniRL the tests run against: the real one where it can be had, else its signatures."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

from tests.helpers import unirl_stub

REAL_UNIRL = bool(os.environ.get("RLT2I_UNIRL")) or importlib.util.find_spec("unirl") is not None
"""True when RLT2I_UNIRL names the folder of an unpacked wheel, or a pip requirement to fetch ("unirl==0.2.0")."""


def provide_unirl(cache: Path) -> None:
    """Make `import unirl` work."""
    if not REAL_UNIRL:
        unirl_stub.install()
        return
    source = os.environ.get("RLT2I_UNIRL", "")
    if source and not Path(source).is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--python-version=3.12", f"--dest={cache}", source], check=True)
        with zipfile.ZipFile(next(cache.glob("unirl-*.whl"))) as wheel:
            wheel.extractall(cache)
        source = str(cache)
    if source:
        sys.path.append(source)
    if importlib.util.find_spec("ray") is None:
        _without_ray()


def _without_ray() -> None:
    """UniRL imports ray beside the base class of its algorithms, which does not use it."""

    class Names(types.ModuleType):
        __path__: list[str] = []  # noqa: RUF012

        def __getattr__(self, name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    names = ("ray", "ray.actor", "ray.exceptions", "ray.util", "ray.util.placement_group")
    for name in (*names, "ray.util.scheduling_strategies"):
        sys.modules[name] = Names(name)
