"""What a run was made with, and what must not be written down."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlt2i.config.version import __version__

PACKAGES = ("rlt2i", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")
REDACTED = "<redacted>"

_SECRET_NAME = re.compile(r"(.*_)?(api)?key|.*(token|password|passwd|secret|credential|authorization).*", re.I)
_NAME_OF_A_PLACE = re.compile(r".*_(env|file|path|var)$", re.I)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def is_secret_name(name: str) -> bool:
    """Whether a field of this name may hold a secret: `*_key`, `*token*`, `*password*` and their kin.

    `token_env` or `key_file` say where a secret is kept, which is not secret.
    """
    return bool(_SECRET_NAME.fullmatch(name)) and not _NAME_OF_A_PLACE.fullmatch(name)


def redacted(value: Any, *, secret: bool = False) -> Any:
    """A copy of plain data with the texts under secret names, and user:password in URLs, replaced.

    Truth values stay, and so do numbers under `*token*` (`max_tokens: 77` must survive a dump).
    """
    if isinstance(value, Mapping):
        return {k: _redacted_field(str(k), v, secret) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, secret=secret) for item in value]
    if isinstance(value, str):
        return REDACTED if secret else _USER_IN_URL.sub(REDACTED, value)
    return value


def _redacted_field(name: str, value: Any, secret: bool) -> Any:
    secret = secret or is_secret_name(name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if secret and number and "token" not in name.lower():
        return REDACTED
    return redacted(value, secret=secret)


def redacted_command(arguments: Sequence[str]) -> str:
    """A command line that a shell reads back, with `--token x`, `--set a.api_key=x` and the like replaced."""
    shown: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        option = shown[-1] if shown and shown[-1].startswith("-") and "=" not in shown[-1] else ""
        if _names_secret(option) and not argument.startswith("-"):
            shown.append(REDACTED)
        elif equals and _names_secret(name):
            shown.append(f"{name}={REDACTED}")
        else:
            shown.append(_USER_IN_URL.sub(REDACTED, argument))
    return shlex.join(shown)


def _names_secret(option: str) -> bool:
    return is_secret_name(option.lstrip("-").replace("-", "_").rpartition(".")[2])


def versions() -> dict[str, Any]:
    """Versions, platform, commit and command line of this process, JSON-able and without secrets."""
    import torch

    found = {name: _version(name) for name in PACKAGES}
    return {
        **found,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "git": _git(Path(__file__).resolve().parents[1]),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": redacted_command([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return __version__ if package == "rlt2i" else None


def _git(package: Path) -> dict[str, Any] | None:
    """Commit of the repository the package lies in; None for a copy installed inside another one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None
