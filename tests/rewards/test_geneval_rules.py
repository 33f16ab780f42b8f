"""GenEval's rules: by hand on small scenes, and against a second statement of them on thousands of random ones."""

from __future__ import annotations

import random

import pytest

from rlt2i.rewards.geneval_rules import (
    CLASSES,
    Detection,
    check_prompt,
    dense,
    judge_objects,
    keep_confident,
    needing_colour,
    official,
    relations,
    score,
)
from tests.helpers.geneval_reference import DIRECTION, Scene, Statement, holds, random_case

CASES = 6_000


def at(x, y, size=20.0, *, confidence=0.9, index=0):
    half = size / 2
    return Detection(box=(x - half, y - half, x + half, y + half), score=confidence, index=index)


def no_colour(found, name):
    raise AssertionError("nothing asks for a colour here")


def test_relations_by_hand():
    # Centres 100 apart, sizes 20 and 20: (100 - 4) / 100 = 0.96 > 0.5.
    assert relations(at(0, 0).box, at(100, 0).box) == {"left of"}
    assert relations(at(0, 100).box, at(0, 0).box) == {"below"}
    # On the diagonal: (100 - 4) / 141.4 = 0.68 in both directions.
    assert relations(at(100, 0).box, at(0, 100).box) == {"right of", "above"}
    # As far apart as a tenth of the joint size: nothing can be said.
    assert relations(at(4, 0).box, at(0, 0).box) == frozenset()
    assert relations(at(0, 0).box, at(0, 0).box) == frozenset()


def test_thresholds_are_strict_and_depend_on_the_tag():
    found = {"cow": [at(0, 0, confidence=c) for c in (0.3, 0.31, 0.9, 0.95)], "dog": [at(0, 0, confidence=0.1)]}
    assert [d.score for d in keep_confident(found, "colors")["cow"]] == [0.95, 0.9, 0.31]
    assert [d.score for d in keep_confident(found, "counting")["cow"]] == [0.95]
    assert "dog" not in keep_confident(found, "colors")
    many = {"cow": [at(0, 0, confidence=0.5 + i / 100) for i in range(30)]}
    kept = keep_confident(many, "position")["cow"]
    assert len(kept) == 16
    assert kept[0].score == 0.79


def test_counting_by_hand():
    prompt = {
        "tag": "counting",
        "include": [{"class": "cow", "count": 2}],
        "exclude": [{"class": "cow", "count": 3}],
    }
    scores = [dense({"cow": [at(0, 0)] * n} if n else {}, prompt, no_colour).score for n in range(6)]
    assert scores == [0.0, 0.5, 1.0, 0.5, 0.0, -0.5]
    right = [official({"cow": [at(0, 0)] * n} if n else {}, prompt, no_colour).correct for n in range(4)]
    assert right == [False, False, True, False]


def test_colour_attribution_by_hand():
    prompt = {
        "tag": "color_attr",
        "include": [{"class": "cow", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
    }
    colours = {0: "red", 1: "green", 2: "blue"}
    scene = Scene({"cow": [at(0, 0)], "dog": [at(9, 0, index=1), at(5, 0, index=2)]}, colours)
    # Cow: 1 and 1. Dog: two of them, so 0, and 0 for its colour.
    assert dense(scene.objects, prompt, scene.colour_of).score == 0.5
    # The benchmark looks at the most confident dog alone, and that one is green.
    verdict = official(scene.objects, prompt, scene.colour_of)
    assert verdict.reasons == ("expected 1 blue dog, found 0",)
    colours[1] = "blue"
    assert official(scene.objects, prompt, scene.colour_of).correct
    assert score("strict", scene.objects, prompt, scene.colour_of).score == 0.0


def test_a_wrong_place_by_hand_with_and_without_the_peers_defect():
    prompt = {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    }
    wrong = {"cow": [at(0, 0)], "dog": [at(100, 0, index=1)]}
    assert score("dense", wrong, prompt, no_colour).score == pytest.approx(2 / 3)
    assert score("dense_peers", wrong, prompt, no_colour).score == pytest.approx(3 / 4)
    right = {"cow": [at(100, 0)], "dog": [at(0, 0, index=1)]}
    assert all(
        score(rule, right, prompt, no_colour).score == 1.0 for rule in ("dense", "dense_peers", "strict", "official")
    )
    # Without its target a place is wrong, in both readings alike.
    assert score("dense", {"dog": [at(0, 0)]}, prompt, no_colour).score == pytest.approx(1 / 3)
    assert score("dense_peers", {"dog": [at(0, 0)]}, prompt, no_colour).score == pytest.approx(1 / 3)


def test_relations_agree_with_the_second_statement():
    rng = random.Random(1)
    for _ in range(CASES):
        a, b = (at(rng.randrange(0, 60), rng.randrange(0, 60), rng.choice([0, 10, 30, 80])) for _ in range(2))
        assert relations(a.box, b.box) == {name for name in DIRECTION if holds(name, a, b)}


def test_every_rule_agrees_with_the_second_statement():
    rng = random.Random(2)
    seen = {True: 0, False: 0}
    for _ in range(CASES):
        scene, prompt = random_case(rng)
        check_prompt(prompt)
        verdict = dense(scene.objects, prompt, scene.colour_of)
        with_defect = dense(scene.objects, prompt, scene.colour_of, repeat_defect=True)
        exact, loose = Statement(scene, prompt, exact=True), Statement(scene, prompt, exact=False)
        assert verdict.score == pytest.approx(exact.mean_of_parts())
        assert with_defect.score == pytest.approx(exact.mean_of_parts(defect=True))
        assert with_defect.score >= verdict.score - 1e-9 or exact.mean_of_parts() > 1
        assert verdict.correct == exact.everything()
        assert official(scene.objects, prompt, scene.colour_of).correct == loose.everything()
        assert verdict.correct == (verdict.score == pytest.approx(1.0))
        seen[loose.everything()] += 1
    assert min(seen.values()) > CASES / 20


def test_colours_are_asked_for_where_a_rule_needs_them_and_nowhere_else():
    rng = random.Random(3)
    for _ in range(CASES // 4):
        scene, prompt = random_case(rng)
        prompt.pop("exclude", None)
        announced = {(name, d.index) for d, name in needing_colour(scene.objects, prompt, everything=False)}

        def colour_of(found, name, scene=scene, announced=announced):
            assert (name, found.index) in announced
            return scene.colours[found.index]

        official(scene.objects, prompt, colour_of)
        dense(scene.objects, prompt, colour_of)


def test_judgements_of_objects_by_hand():
    prompt = {
        "tag": "position",
        "include": [
            {"class": "cow", "count": 1, "color": "red"},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
    }
    scene = Scene(
        {
            "cow": [at(100, 0, index=0), at(200, 0, index=1), at(300, 0, index=2)],
            "dog": [at(400, 0, index=3), at(0, 0, index=4)],
            "cat": [at(0, 50, index=5)],
        },
        {0: "green", 1: "red", 2: "red"},
    )
    judged = {d.index: word for d, _, word in judge_objects(scene.objects, prompt, scene.colour_of, "dense")}
    assert judged == {0: "wrong colour", 1: "right", 2: "surplus", 3: "wrong place", 4: "surplus"}
    lenient = {d.index: word for d, _, word in judge_objects(scene.objects, prompt, scene.colour_of, "official")}
    assert lenient == {0: "wrong colour", 1: "right", 3: "wrong place"}


def test_a_correct_scene_has_no_object_that_hurts():
    rng = random.Random(4)
    correct = 0
    for _ in range(CASES):
        scene, prompt = random_case(rng)
        if not dense(scene.objects, prompt, scene.colour_of).correct:
            continue
        correct += 1
        words = [word for _, _, word in judge_objects(scene.objects, prompt, scene.colour_of, "dense")]
        assert set(words) == {"right"}
    assert correct > 50


def test_classes_are_coco_in_order():
    assert len(set(CLASSES)) == 80
    assert (CLASSES[0], CLASSES[64], CLASSES[65], CLASSES[66], CLASSES[79]) == (
        "person",
        "computer mouse",
        "tv remote",
        "computer keyboard",
        "toothbrush",
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"include": [{"class": "cow", "count": 1}]}, "needs a tag"),
        ({"tag": "colors", "include": []}, "at least one clause"),
        ({"tag": "colors", "include": [{"class": "unicorn", "count": 1}]}, "none of COCO's 80"),
        ({"tag": "colors", "include": [{"class": "cow", "count": 0}]}, "whole number"),
        ({"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "mauve"}]}, "color is not one of"),
        ({"tag": "position", "include": [{"class": "cow", "count": 1, "position": ["above", 0]}]}, "earlier clause"),
    ],
)
def test_metadata_that_cannot_be_judged_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        check_prompt(prompt)
