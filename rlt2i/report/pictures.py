"""uint8 tensors to pictures: sizes, frames, and bytes that fit into a page."""

from __future__ import annotations

import base64
import io
import textwrap
import warnings

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform
from torchvision.utils import make_grid

SUCCESS, FAILURE, NEUTRAL = "#2A8C4A", "#C8442E", "#9A9A9A"
TINY = 96
"""Images up to this many pixels a side are shown pixel by pixel; larger ones are photographs."""


def check_images(name: str, images: Tensor) -> Tensor:
    """[N, 3, H, W] uint8, or an error that says what to do.

    Raises:
        ValueError: for another shape or type.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{name}: got shape {list(images.shape)}, expected [N, 3, H, W].")
    if images.dtype is not torch.uint8:
        raise ValueError(f"{name}: got {images.dtype}, expected uint8 RGB. Convert with to_uint8(images).")
    return images


def rgb(colour: str) -> tuple[int, int, int]:
    """'#RRGGBB' to three integers."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def colour_map(values: Tensor) -> Tensor:
    """Viridis: lightness rises evenly with the value.

    Args:
        values: [...] in [0, 1]; values outside are clipped, nan is shown as 0.

    Returns:
        [3, ...] uint8.
    """
    colours = torch.from_numpy(matplotlib.colormaps["viridis"](values.nan_to_num().clamp(0, 1).numpy()))
    return (255 * colours[..., :3]).round().to(torch.uint8).movedim(-1, 0)


def thumbnail(images: Tensor, side: int) -> Tensor:
    """Shrink [..., 3, H, W] to at most `side` pixels; never enlarge (a page enlarges by CSS, without bytes)."""
    height, width = images.shape[-2:]
    longest = max(height, width)
    if longest <= side:
        return images
    size = [max(1, round(length * side / longest)) for length in (height, width)]
    return transform.resize(images, size, InterpolationMode.BICUBIC, antialias=True)


def enlarge(images: Tensor, side: int) -> Tensor:
    """[..., 3, H, W] at about `side` pixels: tiny ones by a whole factor, so that pixels stay square."""
    factor = max(1, side // max(images.shape[-2:]))
    return thumbnail(images.repeat_interleave(factor, -2).repeat_interleave(factor, -1), side)


def tiled(tiles: list[Tensor], columns: int, gap: int) -> Tensor:
    """[3, H, W]: tiles [3, h, w] row by row on white, with a gap between and around them."""
    if len(tiles) == 1:  # make_grid leaves a single image without its border
        return transform.pad(tiles[0], [gap], fill=255)
    return make_grid(torch.stack(tiles), columns, gap, pad_value=255)


def data_uri(image: Tensor) -> str:
    """[3, H, W]: PNG for tiny images and drawings; JPEG for photographs, which would be ten times larger as PNG."""
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
    buffer = io.BytesIO()  # Pillow writes it: the encoders of torchvision.io are deprecated since 0.29
    kind, options = ("png", {"optimize": True}) if max(picture.size) <= TINY else ("jpeg", {"quality": 88})
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def wrapped(text: str, width: float, lines: int) -> str:
    """Text broken to fit `width` pixels at 12 pixels a line; what does not fit into `lines` ends in dots."""
    return "\n".join(textwrap.wrap(text, max(4, int(width / 7)), max_lines=lines, placeholder="…"))


def rendered(canvas: Figure) -> Image.Image:
    """A figure as an RGB picture, one pixel a pixel."""
    agg = FigureCanvasAgg(canvas)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a script that the font lacks is drawn as boxes
        agg.draw()
    return Image.fromarray(np.asarray(agg.buffer_rgba())[..., :3].copy())


def paste(canvas: Figure, image: Tensor, x: int, y: int) -> None:
    """Put [3, H, W] with its top left corner at (x, y) pixels from the top left, without resampling."""
    bottom = round(canvas.get_figheight() * canvas.dpi) - y - image.shape[1]
    canvas.figimage(image.permute(1, 2, 0).numpy(), x, bottom, origin="upper")
