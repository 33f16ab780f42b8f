"""How much memory the networks of rewards take, known before anything is fetched.

All of them are kept beside the policy for as long as a run lasts, nearly all in float32. Numbers of parameters are
those of the released configurations (the tests build each of them on the meta device and count); of a folder the
headers are read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rlt2i.rewards.weights import weights_home

_LARGEST_HEADER: Final = 100 << 20

PARAMETERS: Final[Mapping[str, int]] = {
    "openai/clip-vit-base-patch32": 151_277_313,
    "openai/clip-vit-base-patch16": 149_620_737,
    "openai/clip-vit-large-patch14": 427_616_513,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 986_109_441,
    "yuvalkirstain/PickScore_v1": 986_109_441,
    "hpsv2": 986_109_441,
    "hpsv2.1": 986_109_441,
    "hpsv3": 7_744_923_136,
    "imagereward-v1.0": 445_279_489,
    "aesthetic_sac_logos_ava1_l14": 769,
    "mask2former_swin-s_mmdet": 68_741_083,
}
"""Weights, as rewards name them -> parameters."""


WEIGHT_FIELDS: Final = ("path", "head", "detector", "colour_model")
"""Fields of rewards that say where weights are."""


def weights_of(reward: Any) -> list[str]:
    """The weights that a reward names in its fields."""
    return [getattr(reward, field) for field in WEIGHT_FIELDS if hasattr(reward, field)]


def bytes_of(path: str, *, each: int = 4) -> int | None:
    """Bytes that weights take once they are loaded; None where nobody knows before they are.

    Args:
        path: as rewards name them: a folder, the name of converted weights, or a hub name.
        each: bytes of a number in the precision in which they are loaded.
    """
    for folder in (Path(path).expanduser(), weights_home() / path):
        if folder.is_dir() and (files := sorted(folder.rglob("*.safetensors"))):
            return each * sum(_values(file) for file in files)
    known = PARAMETERS.get(path)
    return None if known is None else each * known


def _values(file: Path) -> int:
    """Numbers in a safetensors file, by its header: a length, then JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(min(length, _LARGEST_HEADER)))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
