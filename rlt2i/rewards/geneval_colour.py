"""The colour of a detected object, as GenEval reads it: CLIP on the object cut out and put on flat grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from rlt2i.rewards.clip_family import CLIPTowers, clip_pixels
from rlt2i.rewards.geneval_rules import COLOURS, Box

GREY: Final = 0x99
TEMPLATES: Final = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)


@attrs.frozen(kw_only=True, eq=False)
class Cutout:
    """One object whose colour is asked for.

    Attributes:
        image: [3, H, W] uint8.
        mask: [H, W] bool.
        box: (x1, y1, x2, y2) in pixels.
        name: its class.
    """

    image: Tensor
    mask: Tensor
    box: Box
    name: str


def colour_weights(clip: CLIPTowers, name: str) -> Tensor:
    """[10, D] one unit vector per colour: the mean of three phrasings, each of length one."""
    texts = [t.format(colour=colour, name=name) for colour in COLOURS for t in TEMPLATES]
    return F.normalize(clip.texts(texts).view(len(COLOURS), len(TEMPLATES), -1).mean(1), dim=-1)


def classify_colours(clip: CLIPTowers, cutouts: Sequence[Cutout], *, per_chunk: int = 32) -> list[str]:
    """The most similar of the ten colours for each object."""
    weights = {name: colour_weights(clip, name) for name in dict.fromkeys(c.name for c in cutouts)}
    colours = []
    for start in range(0, len(cutouts), per_chunk):
        chunk = cutouts[start : start + per_chunk]
        pixels = torch.cat([clip_pixels(_cut_out(c), clip.side, rounded=True) for c in chunk])
        embedded = clip.images(pixels)
        similarity = torch.stack([weights[c.name] @ e for c, e in zip(chunk, embedded, strict=True)])
        colours += [COLOURS[i] for i in similarity.argmax(1).tolist()]
    return colours


def _cut_out(cutout: Cutout) -> Tensor:
    """[1, 3, h, w] in [0, 1]: the object on grey, cropped to its box."""
    x1, y1, x2, y2 = (round(edge) for edge in cutout.box)
    on_grey = torch.where(cutout.mask, cutout.image, torch.full_like(cutout.image, GREY))
    return on_grey[None, :, y1:y2, x1:x2].float() / 255
