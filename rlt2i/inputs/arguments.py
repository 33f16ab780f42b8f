"""What the command line checks of its arguments before anything is loaded, and the examples of its help.

Standard library alone: `rlt2i --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

COUNTS: Final = ("steps", "count", "prompts", "images", "processes")
"""Options that count something; none of them means anything below 1."""

EXAMPLES: Final[Mapping[str, Sequence[str]]] = {
    "list": (
        "rlt2i list",
        "rlt2i list shapes --evidence gated         # what has been shown to work on a laptop",
        "rlt2i list star sd35",
    ),
    "doctor": ("rlt2i doctor", "rlt2i doctor star-sd35-geneval"),
    "plan": (
        "rlt2i plan star-sd35-ocr --processes 8 --gpu h100",
        "rlt2i plan star-sd35-ocr --fit 24GB --out mine.yaml",
    ),
    "rehearse": ("rlt2i rehearse star-sd35-geneval", "rlt2i rehearse --all --no-compile"),
    "check": (
        "rlt2i check policy Flux --tiny",
        "rlt2i check policy my_backbone.py:MySpec --set path=weights/mine --size 64x96",
        "rlt2i check policy star-sd35-geneval --tiny",
        "rlt2i check star-sd35-ocr --tiny",
        "rlt2i check star-sd35-ocr --device cuda  # before a long run",
    ),
    "train": (
        "rlt2i train star-shapes --report",
        "rlt2i train star-shapes --set credit.mix=0.7 --set train.seed=1 --run-dir runs/mine",
        "rlt2i train star-sd35-geneval --dry-run --processes 8",
        "rlt2i train --run-dir runs/mine --resume",
    ),
    "sample": (
        "rlt2i sample runs/mine --prompt 'a red circle' --prompt 'two blue squares'",
        "rlt2i sample star-shapes --prompt 'a red circle' --count 8 --out circles.png --separate",
    ),
    "eval": (
        "rlt2i eval runs/mine",
        "rlt2i eval runs/mine --suite shapes",
        "rlt2i eval runs/mine/eval/shapes-ema-000100 --reward JPEGCompressibility",
    ),
    "maps": ("rlt2i maps runs/mine --prompt 'a red circle left of a blue square' --out maps.png",),
    "look": ("rlt2i look runs/mine --prompt 'a red circle left of a blue square' --seed 0 1 2",),
    "pairs": ("rlt2i pairs star-shapes pairs/shapes --prompts 600 --images 4",),
    "vote": (
        "rlt2i vote runs/mine votes/mine",
        "rlt2i vote runs/mine votes/mine --prompt 'a red circle' --prompt 'two blue squares' --images 4",
    ),
    "export": (
        "rlt2i export runs/mine --to comfyui",
        "rlt2i export runs/mine --to merged --out mine --push me/mine",
    ),
    "report": ("rlt2i report runs/mine", "rlt2i report runs/mine --out mine.html"),
    "compare": (
        "rlt2i compare star=runs/a,runs/b uniform=runs/c,runs/d",
        "rlt2i compare new=runs/e old=runs/f --baseline old --metric eval/objects",
        "rlt2i compare runs/mine --reference star-nft-cells",
    ),
    "bench": ("rlt2i bench PLAN --help", "rlt2i bench lab"),
    "pretrain": ("rlt2i pretrain shapes --help",),
    "serve-reward": (
        "rlt2i serve-reward OCRReward --port 8917",
        "rlt2i serve-reward my_rewards.py:MyReward --host 0.0.0.0",
    ),
    "reward": ("rlt2i reward test JPEGCompressibility", "rlt2i reward test my_rewards.py:MyReward"),
}
"""Command -> what to type."""


def examples(command: str) -> str:
    """The end of a command's help."""
    lines = EXAMPLES.get(command, ())
    return "\n".join(["examples:", *(f"  {line}" for line in lines)]) if lines else ""


def home_path(text: str) -> Path:
    """An argument that is a path, with ~ for the home folder; for `type=` of an option."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def home_name(text: str) -> str:
    """An argument that is a path or a name, with ~ for the home folder."""
    return str(home_path(text)) if text.startswith("~") else text


def check_counts(options: argparse.Namespace) -> None:
    """Refuse counts below 1, which would otherwise mean "the default", or fail after all the work.

    Raises:
        ValueError: naming the option.
    """
    for name in COUNTS:
        value = getattr(options, name, None)
        if isinstance(value, int) and value < 1:
            default = ", or leave it out for the default" if name != "processes" else ""
            raise ValueError(f"--{name} {value}: use 1 or more{default}.")


def check_file(out: Path, flag: str = "--out") -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        ValueError: saying what is in the way.
    """
    if out.is_dir():
        raise ValueError(f"{flag} {out}: is a folder; name a file in it.")
    check_folder(out.parent, f"{flag} {out}")
    if out.exists() and not os.access(out, os.W_OK):
        raise ValueError(f"{flag} {out}: cannot be written. Name another file.")


def check_folder(folder: Path, what: str) -> None:
    """Refuse a folder that cannot be there or written to.

    Raises:
        ValueError: saying what is in the way.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise ValueError(f"{what}: {above} is a file, so there can be no folder of that name. Name another one.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{what}: {above} cannot be written to. Name another folder.")


def check_picture(out: Path) -> None:
    """Refuse a picture whose name does not say its format, before it is drawn.

    Raises:
        ValueError: naming formats that can be written.
    """
    from PIL import Image

    formats = Image.registered_extensions()
    if formats.get(out.suffix.lower()) not in Image.SAVE:
        reason = f"no format that can be written is called {out.suffix!r}" if out.suffix else "it has no suffix"
        raise ValueError(f"--out {out}: {reason}; end the name in .png, .jpg or .webp, such as {out.stem}.png.")
    check_file(out)
