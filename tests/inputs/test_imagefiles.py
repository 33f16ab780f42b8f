"""Pictures as a viewer shows them: orientation, 16 bits, transparency, and files that are damaged."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlt2i.inputs.imagefiles import ImageFileError, read_picture

COLOURS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def test_sixteen_bit_grey_keeps_its_levels(tmp_path: Path):
    # 0, a quarter, a half, all: 0, 64, 128, 255 of 255.
    levels = np.array([[0, 16448, 32896, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        assert read_picture(tmp_path / name).tolist() == [[[v] * 3 for v in (0, 64, 128, 255)]]


def test_the_cameras_orientation_is_applied(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), np.rot90(COLOURS, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white_and_hides_its_colour(tmp_path: Path, mode: str):
    if mode == "P":
        picture = Image.new("P", (2, 1))
        picture.putpalette([9, 9, 9, 200, 0, 0])
        picture.putdata([0, 1])
        picture.save(tmp_path / "a.png", transparency=1)
    else:
        clear, solid = {"RGBA": ((200, 0, 0, 0), (9, 9, 9, 255)), "LA": ((200, 0), (9, 255))}[mode]
        picture = Image.new(mode, (2, 1), solid)
        picture.putpixel((1, 0), clear)
        picture.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").tolist() == [[[9] * 3, [255] * 3]]


def test_half_transparent_black_on_white_is_grey(tmp_path: Path):
    Image.new("RGBA", (1, 1), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").tolist() == [[[127] * 3]]


def test_plain_pictures_are_as_they_were(tmp_path: Path):
    for picture, expected in (
        (Image.fromarray(COLOURS), COLOURS),
        (Image.new("L", (2, 1), 7), [[[7] * 3] * 2]),
        (Image.new("1", (2, 1), 1), [[[255] * 3] * 2]),
    ):
        picture.save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_picture(str(tmp_path / "a.png")), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.95])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, kind: str, kept: float):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    content = buffer.getvalue()
    (tmp_path / "a").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ImageFileError, match="is no image that can be read"):
        read_picture(tmp_path / "a")
    (tmp_path / "a").write_bytes(content)
    assert read_picture(tmp_path / "a").shape == (32, 32, 3)


def test_a_png_without_its_end_or_with_a_flipped_bit_is_refused(tmp_path: Path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    flipped = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
    for damaged in (content[:-12], content[:-6], flipped):
        (tmp_path / "b.png").write_bytes(damaged)
        with pytest.raises(ImageFileError, match="is no image that can be read"):
            read_picture(tmp_path / "b.png")


def test_what_has_no_agreed_meaning_is_refused(tmp_path: Path):
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((2, 2), 70_000, np.int32)).save(tmp_path / "wide.tiff")
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((2, 2), 7, np.uint16)).save(tmp_path / "clear.png", transparency=7)
    (tmp_path / "text.png").write_text("no picture")
    for name, words in {
        "float.tiff": "floating-point", "wide.tiff": "32-bit", "moving.gif": "2 frames",
        "clear.png": "transparent level", "text.png": "no image", "gone.png": "is not there",
    }.items():  # fmt: skip
        with pytest.raises(ImageFileError, match=words):
            read_picture(tmp_path / name)
