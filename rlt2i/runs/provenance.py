"""What a run was made with: versions, commit, machine and command line."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlt2i.config.secrets import redacted_command
from rlt2i.config.version import __version__

PACKAGES = ("rlt2i", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


def versions() -> dict[str, Any]:
    """Versions, platform, commit and command line of this process, JSON-able and without secrets."""
    import torch

    packages = {name: _version(name) for name in PACKAGES}
    return {
        **packages,
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
