"""Grids and maps: the right pixels in the right colours."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from rlt2i.report import draw_maps, image_grid
from rlt2i.report.charts import SERIES
from rlt2i.report.maps import overlay, scale_top, spread
from rlt2i.report.pictures import FAILURE, SUCCESS, colour_map, data_uri, enlarge, rgb, thumbnail, wrapped


def luminance(colour: np.ndarray) -> np.ndarray:
    linear = np.where(colour / 255 <= 0.04045, colour / 255 / 12.92, ((colour / 255 + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()}


def test_the_colour_map_gets_lighter_all_the_way():
    ramp = luminance(colour_map(torch.linspace(0, 1, 256)).T.numpy().astype(np.float64))
    assert np.all(np.diff(ramp) > -1e-3)
    assert ramp[-1] - ramp[0] > 0.6
    assert colour_map(torch.tensor([0.0, 1.0, 9.0, torch.nan])).T.tolist() == [
        list(rgb("#440154")), list(rgb("#FDE725")), list(rgb("#FDE725")), list(rgb("#440154"))
    ]  # fmt: skip


def test_every_line_colour_stands_out_on_white():
    for colour in SERIES:
        contrast = 1.05 / (luminance(np.array(rgb(colour), dtype=np.float64)) + 0.05)
        assert contrast >= 3, colour


def test_tiny_images_grow_by_whole_factors():
    tiny = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    large = enlarge(tiny, 10)
    assert large.shape == (3, 9, 9)
    assert torch.equal(large[:, ::3, ::3], tiny)
    assert set(large.flatten().tolist()) == set(tiny.flatten().tolist())  # nothing is blended
    assert enlarge(torch.zeros(3, 256, 512, dtype=torch.uint8), 128).shape == (3, 64, 128)
    assert thumbnail(tiny, 10) is tiny


def test_bytes_in_a_page_give_the_image_back():
    tiny = torch.randint(0, 255, (3, 24, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kind, _, data = data_uri(tiny).partition(",")
    assert kind == "data:image/png;base64"
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(back, tiny.permute(1, 2, 0).numpy())
    assert data_uri(torch.zeros(3, 200, 200, dtype=torch.uint8)).startswith("data:image/jpeg;base64,")


def test_grid_borders_say_who_passed():
    images = torch.full((3, 3, 8, 8), 200, dtype=torch.uint8)
    options = {"captions": ["a red square"] * 3, "scores": [1.0, 0.0, 0.5], "side": 32}
    seen = colours(image_grid(images, passed=[True, False, None], **options))
    assert {rgb(SUCCESS), rgb(FAILURE), (200, 200, 200)} <= seen
    assert rgb(SUCCESS) not in colours(image_grid(images, **options))


def test_grid_has_a_cell_per_image():
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    one, two = (image_grid(images, columns=columns, side=64) for columns in (5, 3))
    assert two.height > one.height
    assert two.width < one.width


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(2, 3, 4, 4), {}, "expected uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), {}, r"\[N, 3, H, W\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {"captions": ["one"]}, "1 captions for 2 images"),
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), {}, "no image"),
    ],
)
def test_grid_refuses(images, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, **options)


def test_long_captions_are_cut_and_odd_ones_survive():
    cut = wrapped("a very long prompt " * 20, 100, 3)
    assert cut.count("\n") == 2
    assert cut.endswith("…")
    assert wrapped("x" * 500, 100, 3).endswith("…")
    assert wrapped("", 100, 3) == ""
    assert wrapped("two\nlines σ", 400, 3) == "two lines σ"
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert image_grid(images, captions=["日本 $x$", ""]).size == image_grid(images, captions=["a", "b"]).size


def test_overlay_by_hand():
    # Black image, two cells: weights 0 and 2 of top 2 give the ends of the scale, at 80 % of their brightness.
    black = torch.zeros(3, 2, 4, dtype=torch.uint8)
    over = overlay(black, torch.tensor([[0.0, 2.0]]), top=2.0, alpha=0.8)
    low, high = (np.rint(0.8 * np.array(rgb(c))).astype(int).tolist() for c in ("#440154", "#FDE725"))
    assert over[:, :, :2].flatten(1).T.tolist() == [low] * 4
    assert over[:, :, 2:].flatten(1).T.tolist() == [high] * 4


def test_overlay_drops_the_colour_of_the_image():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 6, 6)
    grey = torch.full((3, 6, 6), 76, dtype=torch.uint8)
    one, other = (overlay(image, torch.ones(3, 3), top=2).int() for image in (red, grey))
    assert (one - other).abs().max() <= 1


def test_scale_by_hand():
    assert scale_top(torch.ones(10, 4, 4)) == 2.0  # a uniform map looks uniform
    assert scale_top(torch.full((10, 4, 4), 3.0)) == 3.0
    sink = torch.ones(1, 20, 20)
    sink[0, 0, 0] = 100
    assert scale_top(sink) == 2.0  # one attention sink does not darken the rest


def test_spread_keeps_both_ends():
    assert spread(5, 12) == [0, 1, 2, 3, 4]
    assert spread(40, 4) == [0, 13, 26, 39]


def test_draw_maps_accepts_every_shape_of_the_contract():
    images = torch.randint(0, 255, (10, 3, 24, 24), dtype=torch.uint8)
    maps = torch.rand(10, 6, 6)
    sigmas = torch.linspace(1, 0, 11)
    full = draw_maps(images, maps, sigmas, "a red square above a blue circle")
    single = draw_maps(images[:1], maps, sigmas[:10].tolist(), "finished image only")
    assert full.height > single.height
    assert draw_maps(images, maps[:1], sigmas, "constant credit").size == full.size
    assert draw_maps(images[:1], torch.ones(1, 1, 1), sigmas, "uniform").width >= 400
    long = draw_maps(images.repeat(4, 1, 1, 1), maps.repeat(4, 1, 1), torch.linspace(1, 0, 41), "40 steps")
    assert long.width <= 1.3 * full.width  # thinned


def test_draw_maps_refuses_what_does_not_fit():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="3 images for 5 maps"):
        draw_maps(images, torch.ones(5, 2, 2), range(6), "")
    with pytest.raises(ValueError, match="9 sigmas for 3 steps"):
        draw_maps(images, torch.ones(3, 2, 2), range(9), "")
    with pytest.raises(ValueError, match=r"\[T, h, w\]"):
        draw_maps(images, torch.ones(2, 2), range(3), "")
