"""GenEval's prompts: the official ones to the byte, training ones that never ask for the same picture."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter

import pytest

from rlt2i.rewards.geneval_rules import CLASSES, COLOURS, RELATIONS, TAGS, check_prompt
from rlt2i.tasks.geneval import prompts as p
from rlt2i.tasks.geneval.task import GenEvalTask


def test_the_official_prompts_are_the_official_bytes():
    official = p.official_prompts()
    text = "".join(prompt.text + "\n" for prompt in official)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("55b6e3650e980c13")  # generation_prompts.txt
    assert hashlib.sha256(p.to_jsonl(official).encode()).hexdigest() == p.OFFICIAL_SHA256
    assert Counter(prompt.tag for prompt in official) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip


def test_what_is_left_to_train_on():
    held_out = p.held_out_keys()
    pairs = list(itertools.permutations(CLASSES, 2))
    left = {
        "two_object": {p.two_object(a, b).key for a, b in pairs},
        "counting": {p.counting(a, n).key for a in CLASSES for n in (2, 3, 4)},
        "colors": {p.colours(a, c).key for a in CLASSES[1:] for c in COLOURS},
        "position": {p.position(a, r, b).key for a, b in pairs for r in RELATIONS},
    }
    counts = {tag: len(keys - held_out) for tag, keys in left.items()}
    # 25,180 positions are left without the mirror images; one official prompt mirrors another.
    assert counts == {"two_object": 3_061, "counting": 160, "colors": 696, "position": 25_280 - 2 * 99}


def test_keys_ignore_the_order_of_words_and_nothing_else():
    assert p.two_object("cow", "dog").key == p.two_object("dog", "cow").key
    red_cow, blue_dog = ("cow", "red"), ("dog", "blue")
    assert p.colour_attribution(red_cow, blue_dog).key == p.colour_attribution(blue_dog, red_cow).key
    assert p.colour_attribution(("cow", "blue"), ("dog", "red")).key != p.colour_attribution(red_cow, blue_dog).key
    above = p.position("cow", "above", "dog").key
    assert p.mirrored(above) == p.position("dog", "below", "cow").key
    assert p.mirrored(p.mirrored(above)) == above


def test_training_never_asks_for_an_official_picture_and_is_a_stream():
    task = GenEvalTask()
    drawn = task.train_prompts(seed=7, start=0, count=3_000)
    official = {prompt.text for prompt in p.official_prompts()}
    assert not {prompt.text for prompt in drawn} & official
    assert drawn[1_000:1_010] == task.train_prompts(seed=7, start=1_000, count=10)
    assert drawn[:10] != task.train_prompts(seed=8, start=0, count=10)
    shares = Counter(prompt.category for prompt in drawn)
    assert shares["single_object"] == 0
    assert shares["position"] / len(drawn) == pytest.approx(7 / 17, abs=0.04)
    assert shares["counting"] / len(drawn) == pytest.approx(5 / 17, abs=0.04)


def test_every_prompt_can_be_judged_and_says_its_core_phrases():
    task = GenEvalTask()
    for prompt in [*task.train_prompts(seed=0, start=0, count=300), *task.eval_prompts(553)]:
        check_prompt(prompt.metadata)
        assert prompt.metadata == json.loads(json.dumps(prompt.metadata))
        assert task.provides <= set(prompt.metadata)
        assert prompt.core
        assert all(phrase in prompt.text for phrase in prompt.core)
        assert prompt.text == prompt.metadata["prompt"]


def test_core_phrases_by_hand():
    assert p.counting("scissors", 3).core == ("three", "scissorses")
    assert p.position("cow", "left of", "oven").text == "a photo of a cow left of an oven"
    assert p.position("cow", "left of", "oven").core == ("cow", "left of", "oven")
    assert p.colour_attribution(("cow", "orange"), ("dog", "blue")).core == ("orange cow", "blue dog")
    assert p.colours("cow", "orange").text == "a photo of an orange cow"


def test_evaluation_is_the_official_set_or_balanced():
    task = GenEvalTask()
    official = [prompt.text for prompt in p.official_prompts()]
    assert [prompt.text for prompt in task.eval_prompts(553)] == official
    assert [prompt.text for prompt in task.eval_prompts(2 * 553)] == official * 2
    assert Counter(prompt.category for prompt in task.eval_prompts(60)) == dict.fromkeys(TAGS, 10)
    for count in (7, 486, 600):
        with pytest.raises(ValueError, match="multiple of 553"):
            task.eval_prompts(count)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"colours": 1}, "no GenEval categories"),
        ({"single_object": 1}, "none is left"),
        ({"colors": 0}, "at least one above 0"),
        ({"colors": 1, "position": -1}, ">= 0"),
    ],
)
def test_an_impossible_mix_is_refused(mix, message):
    with pytest.raises(ValueError, match=message):
        GenEvalTask(mix=mix)
