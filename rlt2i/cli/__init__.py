"""The command line. Everything heavy is imported by the command that needs it, so `rlt2i --help` answers at once;
argparse suffices for that, and costs no dependency.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO, cast

from rlt2i.cli.grammar import parser
from rlt2i.inputs.arguments import check_counts
from rlt2i.inputs.display import VisibleStream

__all__ = ["DEBUG", "EXTRAS", "main", "parser"]

DEBUG = "RLT2I_DEBUG"
EXTRAS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "timm": "dino",
    "rapidocr": "ocr",
    "onnxruntime": "ocr",
    "starlette": "serve",
    "uvicorn": "serve",
    "httpx": "serve",
    "ray": "ray",
}
_SAYS_ENOUGH = (
    "CheckpointError",
    "LaunchError",
    "OtherProcessFailed",
    "OutOfStep",
    "ProcessLost",
    "RayRunError",
    "RunDirectoryError",
    "RunStopped",
    "ShardError",
    "UpdateRefused",
)
"""Errors whose message is written for the user; by name, because importing them costs seconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. 0 when it did what was asked, 2 when the user can mend it, with one message and no traceback."""
    with (
        contextlib.redirect_stdout(cast(TextIO, VisibleStream(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, VisibleStream(sys.stderr))),
    ):
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that a recipe can name `my_module:MyPart`, as `python -m` can
    options = parser().parse_args(arguments)
    if getattr(options, "trust_code", False) or getattr(options, "accept_changes", False):
        os.environ["RLT2I_TRUST_CODE"] = "1"  # processes that this one starts must know, too
    if os.environ.get(DEBUG):
        return _obey(options)
    try:
        return _obey(options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"rlt2i: interrupted{notes}.", file=sys.stderr)
        return 130
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        from rlt2i.config.secrets import redacted_text

        print(f"rlt2i: {redacted_text(message)}", file=sys.stderr)
        return 2


def _obey(options: argparse.Namespace) -> int:
    check_counts(options)
    command: Callable[[argparse.Namespace], int | None] = options.command
    return command(options) or 0


def _user_message(error: Exception) -> str | None:
    """What to tell the user; None for an error that is ours and deserves its traceback."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "rlt2i").partition(".")[0]
        wanted = f"'rlt2i[{EXTRAS[package]}]'" if package in EXTRAS else package
        return None if package == "rlt2i" else f"{error}. Install it with: pip install {wanted}"
    if isinstance(error, ImportError):  # a package that is there and cannot be loaded, such as one without its libGL
        return None if (error.name or "").partition(".")[0] == "rlt2i" else f"{error}. Mend the installation of it."
    if type(error).__name__ == "SafetensorError":  # by name: a command without weights need not import it
        from rlt2i.runs.files import error_of_the_system

        error = error_of_the_system(error) or error
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        from rlt2i.runs.files import advice

        return f"{error}. {advice(error, Path(str(error.filename or '.')))}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        first = str(error).strip().split("\n")[0] or "Out of memory."
        return (
            f"{first} Compute less at once: --set train.micro_batch_size=... while learning, "
            "--set train.rollout_batch_size=... while sampling and judging, --set policy.gradient_checkpointing=true. "
            "A run goes on with these from its last checkpoint: --resume."
        )
    if isinstance(error, ValueError | FileNotFoundError) or type(error).__name__ in _SAYS_ENOUGH:
        return f"{error}\n({DEBUG}=1 shows where this came from.)"
    return None
