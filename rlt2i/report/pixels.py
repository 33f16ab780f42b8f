"""uint8 tensors to pictures: enlarging, text, and bytes that fit into a page."""

from __future__ import annotations

import base64
import io
import unicodedata
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_TINY = 96
"""Images up to this many pixels a side are shown pixel by pixel; larger ones are photographs."""

_SPELLED = {
    "σ": "sigma",
    "→": "->",
    "×": "x",
    "−": "-",
    "–": "-",
    "≥": ">=",
    "…": "...",
    "“": '"',
    "”": '"',
    "’": "'",
}


def check_images(name: str, images: Tensor) -> Tensor:
    """[N, 3, H, W] uint8, or an error that says what to do."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{name}: got shape {list(images.shape)}, expected [N, 3, H, W].")
    if images.dtype is not torch.uint8:
        raise ValueError(f"{name}: got {images.dtype}, expected uint8 RGB. Convert with to_uint8(images).")
    return images


def to_array(image: Tensor) -> NDArray[np.uint8]:
    """[3, H, W] uint8 to [H, W, 3]."""
    return image.detach().cpu().permute(1, 2, 0).contiguous().numpy()


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """Show an image at about `side` pixels: tiny ones by a whole factor, so that pixels stay square."""
    longest = max(image.size)
    if longest > side:
        return image.resize(_scaled(image.size, side / longest), Image.Resampling.LANCZOS)
    factor = max(1, side // longest)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """Shrink to at most `side` pixels; never enlarge (a page enlarges by CSS, without bytes)."""
    longest = max(image.size)
    if longest <= side:
        return image
    return image.resize(_scaled(image.size, side / longest), Image.Resampling.LANCZOS)


def _scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def data_uri(image: Image.Image) -> str:
    """PNG for tiny images and drawings; JPEG for photographs, which would be ten times larger as PNG."""
    buffer = io.BytesIO()
    if max(image.size) <= _TINY:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


@lru_cache(maxsize=1)
def _system_font() -> str | None:
    for name in (
        "DejaVuSans.ttf",
        "NotoSans-Regular.ttf",
        "LiberationSans-Regular.ttf",
        "Arial.ttf",
        "arial.ttf",
    ):
        try:
            ImageFont.truetype(name, 12)
        except OSError:
            continue
        return name
    return None


@lru_cache(maxsize=16)
def font(size: int) -> Font:
    """A system font with Greek and accents if there is one, else the one that pillow carries."""
    name = _system_font()
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


def drawable(text: str) -> str:
    """Text that the chosen font can draw; pillow's own font knows little beyond ASCII."""
    text = " ".join(text.split())
    if _system_font():
        return text
    for sign, spelled in _SPELLED.items():
        text = text.replace(sign, spelled)
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")


def wrap(draw: ImageDraw.ImageDraw, text: str, face: Font, width: int, max_lines: int) -> list[str]:
    """Break text into lines that fit `width` pixels; what does not fit into `max_lines` ends in dots."""
    lines: list[str] = []
    words = drawable(text).split()
    while words and len(lines) < max_lines:
        taken = 1
        while taken < len(words) and draw.textlength(" ".join(words[: taken + 1]), font=face) <= width:
            taken += 1
        lines.append(" ".join(words[:taken]))
        words = words[taken:]
    return [
        _shorten(draw, line, face, width, force=bool(words) and i == len(lines) - 1) for i, line in enumerate(lines)
    ]


def _shorten(draw: ImageDraw.ImageDraw, line: str, face: Font, width: int, *, force: bool) -> str:
    if not force and draw.textlength(line, font=face) <= width:
        return line
    while line and draw.textlength(line + "...", font=face) > width:
        line = line[:-1]
    return line.rstrip() + "..."
