"""Pair files for the toy policy: 8 x 8 images, winners bright in the top left corner, losers bright elsewhere."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from rlt2i.tasks.pairs import PairFileTask
from tests.helpers.toy import SIDE, ToyTask


def write_pairs(folder: Path, *, count: int = 6, seed: int = 0) -> Path:
    """A file of `count` pairs, each of a prompt of its own."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        for role, corner in (("winner", slice(0, SIDE // 2)), ("loser", slice(SIDE // 2, SIDE))):
            pixels = draw.integers(40, 120, (SIDE, SIDE, 3))
            pixels[corner, corner] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}-{role}.png")
        files = {role: f"{number}-{role}.png" for role in ("winner", "loser")}
        rows.append({"prompt": f"bright corner {number}", **files, "core": ["corner"], "note": 1})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@cache
def toy_pairs() -> PairFileTask:
    """A task of six pairs that is evaluated on the prompts of the toy task."""
    path = write_pairs(Path(tempfile.mkdtemp()))
    return PairFileTask(pairs=str(path), evaluation=ToyTask())
