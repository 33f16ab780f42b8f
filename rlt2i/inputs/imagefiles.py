"""Pictures that a user hands in, decoded as a viewer shows them: upright, all of their grey levels, on white paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlt2i.inputs.textfiles import user_path

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class ImageFileError(ValueError):
    """A picture that cannot be used; the message says why."""


def read_picture(path: str | Path) -> np.ndarray:
    """The pixels of an image file, as [H, W, 3] uint8 RGB.

    The camera's orientation (EXIF) is applied, 16-bit grey is scaled to 8 bits, and what is transparent is laid on
    white, so that colour hidden under it never shows. Everything is decoded, so a file that is cut short is noticed.

    Raises:
        ImageFileError: when the file is missing, damaged, animated, or of a kind that has no agreed meaning as RGB.
    """
    from PIL import Image, ImageOps

    path = user_path(path)
    if not path.is_file():
        raise ImageFileError("is not there")
    try:
        with Image.open(path) as checked:
            checked.verify()  # sums of a PNG's chunks, up to its end; it leaves the file unusable
        with Image.open(path) as opened:
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != "MPO":  # cameras add a preview or a second eye
                raise ImageFileError(f"has {frames} frames; save one of them as an image")
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            return np.array(_rgb(upright), dtype=np.uint8)
    except ImageFileError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageFileError(f"is no image that can be read ({error})") from None


def _rgb(image: Picture) -> Picture:
    from PIL import Image

    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode == "F":
        raise ImageFileError("holds floating-point numbers, which have no agreed white; save it with 8 bits a channel")
    if not (image.has_transparency_data or image.mode in {"La", "RGBa"}):
        return image.convert("RGB")
    visible = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", visible.size, "white"), visible).convert("RGB")


def _eight_bits(image: Picture) -> np.ndarray:
    """[H, W] uint8 of a picture of 16-bit grey levels."""
    levels = np.array(image).astype(np.int64)
    if "transparency" in image.info:
        raise ImageFileError("is 16-bit grey with a transparent level; save it with 8 bits a channel")
    if levels.min(initial=0) < 0 or levels.max(initial=0) > 65535:
        raise ImageFileError("holds 32-bit integers, which have no agreed white; save it with 8 bits a channel")
    return ((levels + 128) // 257).astype(np.uint8)
