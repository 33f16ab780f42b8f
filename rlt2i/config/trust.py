"""Whose code may run: a run directory is data, and looking at one must not execute a file that lies beside it.

A recipe that the user names may name any code. The recipe *inside a run directory* may name only code that is
installed, that this process has imported already, or that this user has trained with before on this machine (its
SHA-256 is remembered). Anything else is refused, until the user says `--trust-code`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path

TRUST = "RLT2I_TRUST_CODE"
"""Environment variable that `--trust-code` sets, so that processes started by this one know."""
_MEMORY = "RLT2I_TRUSTED"
_OWN = Path(__file__).resolve().parents[1]
_INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_FOREIGN: ContextVar[Path | None] = ContextVar("_FOREIGN", default=None)


def is_ours_or_installed(path: Path) -> bool:
    """Whether a file of code belongs to this package, to Python, or to an installed package."""
    return any(path.is_relative_to(root) for root in (_OWN, *_INSTALLED))


@contextlib.contextmanager
def foreign(folder: Path) -> Iterator[None]:
    """Within the block, code is named by a file of this folder and not by the user."""
    token = _FOREIGN.set(folder)
    try:
        yield
    finally:
        _FOREIGN.reset(token)


def untrusted(name: str, file: Path | None) -> tuple[Path, Path] | None:
    """(folder, file) when the code of a reference must not run: who names it, and what would be executed.

    Args:
        name: a dotted module, or the path of a file.
        file: where the path leads; None for a module.
    """
    folder = _FOREIGN.get()
    if folder is None or os.environ.get(TRUST):
        return None
    for path in [file.resolve()] if file is not None else _files_of(name):
        if not is_ours_or_installed(path) and _digest(path) not in _remembered():
            return folder, path
    return None


def remember(files: Iterable[Path]) -> None:
    """This user has run the code in these files; a home that cannot be written to forgets."""
    known = _remembered()
    fresh = sorted({_digest(path) for path in files} - known)
    if fresh:
        with contextlib.suppress(OSError):
            _memory().parent.mkdir(parents=True, exist_ok=True)
            with _memory().open("a", encoding="ascii") as memory:
                memory.write("".join(f"{digest}\n" for digest in fresh))


def _files_of(module: str) -> list[Path]:
    """What importing a module would execute of itself and of the packages around it, found without importing."""
    files: list[Path] = []
    places: Iterable[str] | None = None
    parts = module.split(".")
    for depth, _ in enumerate(parts):
        name = ".".join(parts[: depth + 1])
        if name in sys.modules:
            places = getattr(sys.modules[name], "__path__", ())
            continue
        spec = importlib.machinery.PathFinder.find_spec(name, None if places is None else list(places))
        if spec is None:
            break
        if spec.origin and Path(spec.origin).is_file():
            files.append(Path(spec.origin).resolve())
        places = spec.submodule_search_locations or ()
    return files


def _memory() -> Path:
    return Path(os.environ.get(_MEMORY, "~/.cache/rlt2i/trusted-code")).expanduser()


def _remembered() -> set[str]:
    try:
        return set(_memory().read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError):
        return set()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
