"""Pictures with writing on them: several fonts, sizes, backgrounds and rotations, all from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

SIDE = 512
DEJAVU = Path("/usr/share/fonts/truetype/dejavu")
HERSHEY = (0, 2, 3, 4)
"""cv2.FONT_HERSHEY_SIMPLEX, DUPLEX, COMPLEX and TRIPLEX."""
Font = Callable[[str, int], Image.Image]


def outline(path: Path | None) -> Font:
    """A font of Pillow's: a file, or the Aileron that Pillow brings along."""

    def draw(text: str, size: int) -> Image.Image:
        font = ImageFont.truetype(str(path), size) if path else ImageFont.load_default(size)
        left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
        mask = Image.new("L", (right - left + 8, bottom - top + 8))
        ImageDraw.Draw(mask).text((4 - left, 4 - top), text, font=font, fill=255)
        return mask

    return draw


def stroked(face: int) -> Font:
    """A font of OpenCV's, which comes with RapidOCR."""
    import cv2

    def draw(text: str, size: int) -> Image.Image:
        scale, thick = size / 30, max(2, size // 14)
        (width, height), base = cv2.getTextSize(text, face, scale, thick)
        canvas = np.zeros((height + base + 2 * thick + 8, width + 2 * thick + 8), np.uint8)
        cv2.putText(canvas, text, (thick + 4, height + thick + 4), face, scale, 255, thick, cv2.LINE_AA)
        return Image.fromarray(canvas)

    return draw


def fonts() -> list[Font]:
    """Aileron and four of OpenCV's everywhere; DejaVu where its Debian package is installed."""
    files = [DEJAVU / f"DejaVu{name}.ttf" for name in ("Sans", "Sans-Bold", "Serif", "SansMono")]
    return [outline(None), *(outline(path) for path in files if path.is_file()), *(stroked(face) for face in HERSHEY)]


def background(kind: str, draw: random.Random) -> Image.Image:
    """flat, blobs of colour, or blobs with noise; all bright."""
    bright = lambda: tuple(draw.randint(150, 255) for _ in range(3))
    image = Image.new("RGB", (SIDE, SIDE), bright())
    if kind == "flat":
        return image
    for _ in range(12):
        x, y, r = draw.randint(0, SIDE), draw.randint(0, SIDE), draw.randint(40, 160)
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=bright())
    image = image.filter(ImageFilter.GaussianBlur(12))
    if kind == "noise":
        noise = np.random.default_rng(draw.randint(0, 1 << 30)).normal(0, 12, (SIDE, SIDE, 3))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image


def written(text: str, font: Font, *, size: int = 48, angle: float = 0.0, kind: str = "flat", seed: int = 0) -> Tensor:
    """[3, 512, 512] uint8: the text in one or two lines, dark on bright, somewhere in the picture."""
    draw = random.Random(seed)
    picture = background(kind, draw)
    words = text.split()
    lines = [text] if len(text) <= 14 or len(words) == 1 else [" ".join(words[:-1]), words[-1]]
    masks = [font(line, size) for line in lines]
    width, height = max(mask.width for mask in masks), sum(mask.height + size // 3 for mask in masks)
    shrink = min(1.0, 440 / width)
    block = Image.new("L", (width, height))
    y = 0
    for mask in masks:
        block.paste(mask, ((width - mask.width) // 2, y))
        y += mask.height + size // 3
    block = block.resize((int(width * shrink), int(height * shrink)), Image.Resampling.LANCZOS)
    layer = Image.new("L", (SIDE, SIDE))
    spare = (SIDE - block.width - 40, SIDE - block.height - 160)
    layer.paste(block, (20 + draw.randint(0, max(0, spare[0])), 80 + draw.randint(0, max(0, spare[1]))))
    layer = layer.rotate(angle, resample=Image.Resampling.BICUBIC)
    ink = Image.new("RGB", (SIDE, SIDE), tuple(draw.randint(0, 70) for _ in range(3)))
    picture.paste(ink, (0, 0), layer)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
