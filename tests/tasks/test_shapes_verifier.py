"""The verifier: right on thousands of scenes, hard on wrong ones, and never surprised."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt2i.tasks.embedded.networks import decode_latents, encode_images, load_pipeline
from rlt2i.tasks.shapes.networks import PIPELINE_DIR
from rlt2i.tasks.shapes.prompts import all_prompts, near_misses
from rlt2i.tasks.shapes.render import PALETTE_RGB, render, sample_scenes, shape_coverage
from rlt2i.tasks.shapes.verifier import Detection, regions_on_grid, verify
from rlt2i.tasks.shapes.vocabulary import CATEGORIES, COLOURS, SHAPES

PER_CATEGORY = 500
BY_TEXT = {prompt.text: prompt for prompt in all_prompts()}


@pytest.fixture(scope="module")
def world():
    """3,000 images, 500 per category, with their prompts and scenes."""
    order = random.Random(0)
    prompts = [
        order.choice([prompt for prompt in all_prompts() if prompt.category == category])
        for category in CATEGORIES
        for _ in range(PER_CATEGORY)
    ]
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(prompts, generator)
    return prompts, scenes, render(scenes, generator)


def picture(*objects, background=0.85):
    """Draw (shape, RGB or colour name, x, y, radius) objects on plain grey: [1, 3, 32, 32]."""
    image = torch.full((3, 32, 32), background)
    for shape, colour, x, y, radius in objects:
        rgb = PALETTE_RGB[COLOURS.index(colour)] if isinstance(colour, str) else torch.tensor(colour)
        cover = shape_coverage(torch.tensor(SHAPES.index(shape)), torch.tensor([x, y]), torch.tensor(radius))
        image = image.lerp(rgb[:, None, None].expand_as(image), cover)
    return image[None]


RED_CIRCLE = ("circle", "red", 8.0, 8.0, 4.0)
BLUE_SQUARE = ("square", "blue", 22.0, 9.0, 4.0)
GREEN_CIRCLE = ("circle", "green", 9.0, 23.0, 4.0)


def judge(text, *objects, **options):
    verdict = verify(picture(*objects), [BY_TEXT[text]], **options)
    return verdict.strict.item(), pytest.approx(verdict.partial.item(), abs=1e-6)


# Accuracy


def accuracy(images, prompts):
    return verify(images, prompts).strict.view(len(CATEGORIES), -1).mean(1)


def test_right_on_clean_scenes(world):
    prompts, scenes, images = world
    verdict = verify(images, prompts)
    assert verdict.strict.view(len(CATEGORIES), -1).mean(1).min() > 0.995
    assert (verdict.partial[verdict.strict == 1] == 1).all()
    assert (verdict.num_objects == (scenes.shape >= 0).sum(1)).float().mean() > 0.995


def test_right_on_bytes(world):
    prompts, _, images = world
    assert accuracy((images * 255).round().byte().permute(0, 2, 3, 1), prompts).min() > 0.995


def test_right_under_noise(world):
    prompts, _, images = world
    noise = 0.04 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert accuracy(images + noise, prompts).min() > 0.995


@pytest.mark.slow
def test_right_through_the_shipped_autoencoder(world):
    prompts, _, images = world
    vae = load_pipeline(PIPELINE_DIR).vae
    with torch.no_grad():
        decoded = torch.cat([decode_latents(vae, encode_images(vae, chunk)) for chunk in images.split(200)])
    assert accuracy(decoded, prompts).min() > 0.99
    assert accuracy(decoded, prompts).mean() > 0.995


def test_near_misses_are_wrong(world):
    prompts, _, images = world
    order = random.Random(1)
    verdict = verify(images, [order.choice(near_misses(prompt)) for prompt in prompts])
    assert verdict.strict.mean() < 0.001
    assert verdict.partial.max() < 1


def test_regions_cover_exactly_the_objects(world):
    prompts, scenes, images = world
    region = verify(images, prompts).region
    coverage = shape_coverage(scenes.shape, scenes.centre, scenes.radius) * (scenes.shape >= 0)[..., None, None]
    truth = coverage.amax(1) > 0.5
    assert (region == truth).float().mean() > 0.995


# Scores by hand


def test_a_right_image():
    verdict = verify(picture(RED_CIRCLE, BLUE_SQUARE), [BY_TEXT["a red circle and a blue square"]])
    assert verdict.strict.tolist() == verdict.partial.tolist() == [1.0]
    assert verdict.num_objects.tolist() == [2]
    red, blue = sorted(verdict.detections[0], key=lambda d: d.cx)
    assert (red.shape, red.colour, blue.shape, blue.colour) == ("circle", "red", "square", "blue")
    assert (red.cx, red.cy) == pytest.approx((8.0, 8.0), abs=0.1)
    assert red.area == pytest.approx(50.3, rel=0.03)
    assert red.iou > 0.95


@pytest.mark.parametrize(
    ("text", "objects", "partial"),
    [
        ("a circle", [BLUE_SQUARE], 0.0),
        ("a circle and a square", [RED_CIRCLE], 0.5),
        ("a green circle", [RED_CIRCLE], 0.5),
        ("a red circle and a blue square", [GREEN_CIRCLE, BLUE_SQUARE], 0.75),
        ("a blue circle and a red square", [RED_CIRCLE, BLUE_SQUARE], 0.5),
        ("two circles", [RED_CIRCLE], 0.5),
        ("three circles", [RED_CIRCLE, GREEN_CIRCLE], 2 / 3),
        ("a circle left of a square", [RED_CIRCLE], 0.25),
        ("a circle right of a square", [RED_CIRCLE, BLUE_SQUARE], 0.5),
        # One extra object: a circle where none is counted against it, then 0.6.
        ("a circle", [RED_CIRCLE, BLUE_SQUARE], 0.6),
        ("two circles", [RED_CIRCLE, GREEN_CIRCLE, BLUE_SQUARE], 0.6),
        ("a green square", [RED_CIRCLE, BLUE_SQUARE, GREEN_CIRCLE], 0.5 * 0.6**2),
    ],
)
def test_partial_credit_by_hand(text, objects, partial):
    assert judge(text, *objects) == (0.0, partial)


def test_relations_by_hand():
    for text in ("a circle left of a square", "a square right of a circle", "a square above a circle"):
        objects = [GREEN_CIRCLE, BLUE_SQUARE] if "above" in text else [RED_CIRCLE, BLUE_SQUARE]
        assert judge(text, *objects) == (1.0, 1.0)


def test_extras_are_wrong_unless_the_rule_is_genevals():
    # The hack: fill the canvas, and one of the objects is bound to be right.
    hack = [RED_CIRCLE, BLUE_SQUARE, GREEN_CIRCLE]
    assert judge("a blue square", *hack) == (0.0, 0.36)
    assert judge("a blue square", *hack, rule="geneval") == (1.0, 1.0)
    # Counting is strict under both rules.
    assert judge("two circles", *hack, (*GREEN_CIRCLE[:2], 24.0, 24.0, 4.0), rule="geneval") == (0.0, 0.5)


def test_unreadable_blobs_count_as_objects():
    purple = ("square", (0.6, 0.1, 0.7), 22.0, 22.0, 4.0)
    bar = torch.zeros(1, 3, 32, 32)
    bar[:, :, 14:17, 18:31] = PALETTE_RGB[0][:, None, None] - 0.85
    for image in (picture(RED_CIRCLE, purple), picture(RED_CIRCLE) + bar):
        verdict = verify(image, [BY_TEXT["a circle"]])
        assert verdict.num_objects.item() == 2
        assert verdict.strict.item() == 0
        assert None in {d.shape for d in verdict.detections[0]} | {d.colour for d in verdict.detections[0]}


def test_pale_objects_are_still_read():
    # 80 % of the palette's chroma: what an undertrained model paints.
    pale = (0.8 * PALETTE_RGB[0] + 0.2 * 0.85).tolist()
    assert judge("a red square", ("square", pale, 16.0, 16.0, 4.0)) == (1.0, 1.0)


def test_grey_is_invisible():
    grey = [("circle", (v, v, v), x, 8.0, 4.0) for v, x in ((0.2, 8.0), (0.5, 22.0))]
    verdict = verify(picture(*grey), [BY_TEXT["two circles"]])
    assert (verdict.num_objects.item(), verdict.strict.item(), verdict.partial.item()) == (0, 0, 0)
    assert not verdict.region.any()


# Laws


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(all_prompts()), st.integers(0, 10_000), st.sampled_from(["exclusive", "geneval"]))
def test_any_pixels_get_a_verdict(prompt, seed, rule):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6, generator=generator), size=32)
    images = torch.cat([torch.rand(2, 3, 32, 32, generator=generator), smooth, smooth * 3 - 1])
    verdict = verify(images, [prompt] * 6, rule=rule)
    assert set(verdict.strict.tolist()) <= {0.0, 1.0}
    assert 0 <= verdict.partial.min() <= verdict.partial.max() <= 1
    assert (verdict.partial[verdict.strict == 1] == 1).all()
    for found, masks, region in zip(verdict.detections, verdict.masks, verdict.region, strict=True):
        assert len(found) == len(masks)
        assert masks.sum(0).amax() <= 1  # no pixel belongs to two objects
        assert torch.equal(masks.any(0), region)


def test_an_image_is_judged_alone(world):
    prompts, _, images = world
    picks = list(range(0, 3000, 100))
    together = verify(images, prompts)
    apart = verify(images[picks], [prompts[i] for i in picks])
    assert torch.equal(together.strict[picks], apart.strict)
    assert torch.equal(together.region[picks], apart.region)
    assert [together.detections[i] for i in picks] == list(apart.detections)


def test_the_smallest_call_is_none():
    verdict = verify(torch.zeros(0, 3, 32, 32), [])
    assert verdict.strict.shape == (0,)
    assert verdict.region.shape == (0, 32, 32)


def test_regions_on_grid_by_hand():
    # A square of side 8 aligned with the 4-pixel cells of an 8x8 grid covers four of them.
    square = ("square", "blue", 16.0, 16.0, 4 / 0.88)
    verdict = verify(picture(square), [BY_TEXT["a square"]])
    cells = regions_on_grid(verdict, (8, 8))
    expected = torch.zeros(1, 8, 8)
    expected[:, 3:5, 3:5] = 1
    assert torch.equal(cells, expected)
    assert regions_on_grid(verdict, (16, 16)).mean().item() == pytest.approx(64 / 1024)


# Refusals


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_pixels_are_refused(poison):
    images = picture(RED_CIRCLE).repeat(3, 1, 1, 1)
    images[1, 0, 4, 4] = poison
    with pytest.raises(ValueError, match=r"images \[1\] hold NaN or infinity"):
        verify(images, [BY_TEXT["a circle"]] * 3)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (torch.zeros(1, 3, 24, 24), r"\[1, 3, 24, 24\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"needs \[B, 32, 32, 3\] uint8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "int64"),
        (torch.zeros(2, 3, 32, 32), "2 images but 1 prompts"),
    ],
)
def test_wrong_layouts_are_refused(images, reason):
    with pytest.raises(ValueError, match=reason):
        verify(images, [BY_TEXT["a circle"]])


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="rule='lenient'"):
        verify(picture(RED_CIRCLE), [BY_TEXT["a circle"]], rule="lenient")


def test_detections_are_plain_values():
    (found,) = verify(picture(RED_CIRCLE), [BY_TEXT["a circle"]]).detections[0]
    assert isinstance(found, Detection)
    assert [type(v) for v in (found.cx, found.cy, found.area, found.iou)] == [float] * 4
