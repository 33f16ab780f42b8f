"""The shapes world: what prompts mean, how they are split, and what a rendered scene may contain."""

import json
from collections import Counter

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt2i.tasks.shapes.prompts import (
    HELD_OUT,
    ShapesPrompt,
    all_prompts,
    eval_prompts,
    near_misses,
    split_prompts,
)
from rlt2i.tasks.shapes.render import EXTENT, GAP, PALETTE_RGB, render, sample_scenes, shape_coverage
from rlt2i.tasks.shapes.vocabulary import CANVAS, CATEGORIES, COLOURS, RELATIONS, SHAPES, WORDS

any_prompt = st.sampled_from(all_prompts())
any_seed = st.integers(0, 2**31 - 1)


def scenes_of(prompts, seed=0):
    return sample_scenes(prompts, torch.Generator().manual_seed(seed))


# Prompts


def test_prompt_counts_by_hand():
    # 3 shapes; 3*2 ordered pairs; 3 shapes x 2 numbers; 3 x 4 colours; 6 pairs x 4 relations; 6 pairs x 4*3 colours.
    sizes = Counter(prompt.category for prompt in all_prompts())
    assert sizes == {
        "single_object": 3,
        "two_object": 6,
        "counting": 6,
        "colors": 12,
        "position": 24,
        "color_attr": 72,
    }
    assert len({prompt.text for prompt in all_prompts()}) == 123


def test_prompts_say_only_known_words():
    assert {word for prompt in all_prompts() for word in prompt.text.split()} == set(WORDS)


@pytest.mark.parametrize(
    ("text", "core"),
    [
        ("a circle", ("circle",)),
        ("three squares", ("three", "squares")),
        ("a red triangle", ("red triangle",)),
        ("a circle left of a square", ("circle", "left of", "square")),
        ("a red circle and a blue square", ("red circle", "blue square")),
    ],
)
def test_core_phrases(text, core):
    assert next(prompt for prompt in all_prompts() if prompt.text == text).core == core


@given(any_prompt)
def test_core_phrases_appear_in_order(prompt):
    position = 0
    for phrase in prompt.core:
        position = prompt.text.index(phrase, position) + len(phrase)


@given(any_prompt)
def test_metadata_survives_json(prompt):
    assert ShapesPrompt.from_metadata(json.loads(json.dumps(prompt.metadata()))) == prompt


def test_metadata_without_a_key_is_refused():
    metadata = all_prompts()[0].metadata()
    del metadata["count"]
    with pytest.raises(ValueError, match="lacks count"):
        ShapesPrompt.from_metadata(metadata)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"category": "texture"}, "'texture'"),
        ({"objects": (("hexagon", None), ("circle", None))}, "'hexagon'"),
        ({"objects": (("circle", "mauve"), ("square", None))}, "'mauve'"),
        ({"objects": ()}, "must name an object"),
        ({"count": 3}, "needs a count in"),
        ({"relation": "behind"}, "'behind'"),
        ({"relation": None}, "position prompts need one of"),
    ],
)
def test_impossible_prompts_are_refused(change, reason):
    position = next(prompt for prompt in all_prompts() if prompt.category == "position")
    with pytest.raises(ValueError, match=reason):
        attrs.evolve(position, **change)


def test_split_is_disjoint_where_it_can_be():
    train, held_out = split_prompts()
    for category in CATEGORIES:
        ours = {prompt for prompt in train if prompt.category == category}
        theirs = {prompt for prompt in held_out if prompt.category == category}
        everything = {prompt for prompt in all_prompts() if prompt.category == category}
        assert ours | theirs == everything
        if category in HELD_OUT:
            assert not ours & theirs
            assert len(theirs) == HELD_OUT[category]
        else:
            assert ours == theirs == everything


def test_split_never_changes():
    # Numbers in the docs were measured on this split.
    _, held_out = split_prompts()
    assert [prompt.text for prompt in held_out if prompt.category in ("two_object", "colors")] == [
        "a circle and a square",
        "a square and a triangle",
        "a blue circle",
        "a green triangle",
        "a red square",
    ]


def test_eval_prompts_are_balanced_and_held_out():
    prompts = eval_prompts(7)
    assert [prompt.category for prompt in prompts] == [category for category in CATEGORIES for _ in range(7)]
    assert set(prompts) <= set(split_prompts()[1])
    with pytest.raises(ValueError, match="at least 1 per category"):
        eval_prompts(0)


def test_near_misses_differ_in_one_slot():
    prompt = next(prompt for prompt in all_prompts() if prompt.text == "a circle left of a square")
    assert {miss.text for miss in near_misses(prompt)} == {
        "a circle right of a square",
        "a circle above a square",
        "a circle below a square",
        "a triangle left of a square",
        "a circle left of a triangle",
    }


# Scenes


@settings(max_examples=50, deadline=None)
@given(st.lists(any_prompt, min_size=1, max_size=8), any_seed)
def test_scenes_show_what_is_asked_and_nothing_else_in_colour(prompts, seed):
    scenes = scenes_of(prompts, seed)
    for i, prompt in enumerate(prompts):
        drawn = [j for j in range(3) if scenes.shape[i, j] >= 0]
        assert len(drawn) == prompt.count
        named = prompt.objects * prompt.count if prompt.category == "counting" else prompt.objects
        for j, (shape, colour) in zip(drawn, named, strict=True):
            assert SHAPES[scenes.shape[i, j]] == shape
            assert colour is None or COLOURS[scenes.colour[i, j]] == colour
        if prompt.relation is not None:
            dx, dy = (scenes.centre[i, 0] - scenes.centre[i, 1]).tolist()
            ux, uy = RELATIONS[prompt.relation]
            assert dx * ux + dy * uy > abs(dx * uy) + abs(dy * ux)


@settings(max_examples=50, deadline=None)
@given(st.lists(any_prompt, min_size=1, max_size=8), any_seed)
def test_nothing_overlaps_and_objects_stay_inside(prompts, seed):
    scenes = scenes_of(prompts, seed)
    present = torch.cat([scenes.shape, scenes.distractor], 1) >= 0
    centre = torch.cat([scenes.centre, scenes.distractor_centre], 1)
    reach = torch.cat([scenes.radius * EXTENT, scenes.distractor_radius], 1)
    assert ((centre - reach[..., None] >= 0) & (centre + reach[..., None] <= CANVAS))[present].all()
    for row in range(len(prompts)):
        for i in range(5):
            for j in range(i):
                if present[row, i] and present[row, j]:
                    distance = (centre[row, i] - centre[row, j]).abs().max()
                    assert distance >= reach[row, i] + reach[row, j] + GAP


def test_scenes_and_images_are_functions_of_the_seed():
    prompts = eval_prompts(4)
    first, second = (
        render(sample_scenes(prompts, generator), generator)
        for generator in (torch.Generator().manual_seed(5), torch.Generator().manual_seed(5))
    )
    assert torch.equal(first, second)
    generator = torch.Generator().manual_seed(6)
    assert not torch.equal(first, render(sample_scenes(prompts, generator), generator))


@pytest.mark.parametrize(
    ("shape", "area"),
    # Radius 4: pi 16; a side of 2 * .88 * 4 squared; base 2 * 1.05 * 4 and height 1.8 * 4, halved.
    [("circle", 50.27), ("square", 49.56), ("triangle", 30.24)],
)
def test_coverage_has_the_analytic_area(shape, area):
    coverage = shape_coverage(torch.tensor(SHAPES.index(shape)), torch.tensor([16.3, 15.2]), torch.tensor(4.0))
    assert coverage.sum().item() == pytest.approx(area, rel=0.02)


def test_everything_unjudged_is_grey():
    prompts = eval_prompts(20)
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(prompts, generator)
    images = render(scenes, generator)
    assert images.shape == (120, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    coverage = shape_coverage(scenes.shape, scenes.centre, scenes.radius) * (scenes.shape >= 0)[..., None, None]
    unjudged = coverage.amax(1) == 0
    saturation = images.amax(1) - images.amin(1)
    assert saturation[unjudged].max() < 1e-6
    # The background is textured and bright; distractors are darker than any background.
    grey = images.mean(1)[unjudged]
    assert (grey < 0.60).float().mean() > 0.005
    assert 0.70 <= grey.median() <= 0.97
    covered = coverage.amax(1) == 1
    assert saturation[covered].min() > 0.3


def test_palette_directions_are_far_apart():
    chroma = PALETTE_RGB - PALETTE_RGB.mean(1, keepdim=True)
    direction = chroma / chroma.norm(dim=1, keepdim=True)
    cosine = direction @ direction.T - 2 * torch.eye(4)
    # The verifier accepts a hue within 23 degrees, so two colours need 46.
    assert cosine.max() < 0.69
