"""Which prompts rest, and that a run with a curriculum goes on as if it had never stopped."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.recipes.recipe import build_part
from rlt2i.recipes.train_config import TrainConfig
from rlt2i.runs.metrics import read_metrics
from rlt2i.tasks.base import TaskPrompt
from rlt2i.tasks.curriculum import CurriculumState, PromptCurriculum, texts_without_spread
from rlt2i.training.start import train
from tests.helpers.toy_curriculum import OneOfThreeIsSolved
from tests.helpers.toy_recipe import clipped


def stream(start: int, count: int) -> list[TaskPrompt]:
    """a b c a b c ..."""
    return [TaskPrompt(text="abc"[i % 3]) for i in range(start, start + count)]


def texts(state: CurriculumState, iteration: int) -> tuple[str, list[int], int]:
    chosen = state.choose(stream, count=2, iteration=iteration, seed=0)
    return "".join(prompt.text for prompt in chosen.prompts), chosen.places, chosen.passed_over


def test_without_a_curriculum_the_stream_is_taken_as_it_comes():
    assert texts(CurriculumState(), 3) == ("ab", [6, 7], 0)


def test_a_prompt_without_spread_rests_by_hand():
    state = CurriculumState(PromptCurriculum(rest=2))
    first = state.choose(stream, count=2, iteration=0, seed=0)
    assert texts(state, 0) == ("ab", [0, 1], 0)
    state.learned(first, ["b"], iteration=0)  # b rests in iterations 1 and 2
    assert texts(state, 1) == ("ca", [2, 3], 0)
    state.learned(state.choose(stream, count=2, iteration=1, seed=0), [], iteration=1)
    assert texts(state, 2) == ("ca", [5, 6], 1)
    assert state.metrics(state.choose(stream, count=2, iteration=2, seed=0)) == {
        "curriculum/resting": 1.0, "curriculum/passed_over": 1.0,
    }  # fmt: skip
    state.learned(state.choose(stream, count=2, iteration=2, seed=0), [], iteration=2)
    assert texts(state, 3) == ("bc", [7, 8], 0)


def test_when_everything_rests_the_stream_goes_on():
    state = CurriculumState(PromptCurriculum(rest=5), rests_until=dict.fromkeys("abc", 9))
    assert texts(state, 0) == ("ab", [0, 1], 14)  # eight times two were looked at
    state.rests_until.pop("c")
    assert texts(state, 0) == ("cc", [2, 5], 4)


def test_a_weight_between_keeps_its_share():
    state = CurriculumState(PromptCurriculum(rest=5, keep=0.25), rests_until={"a": 9})
    kept = state.choose(stream, count=1000, iteration=0, seed=0)
    share = sum(prompt.text == "a" for prompt in kept.prompts) / (max(kept.places) / 3)
    assert share == pytest.approx(0.25, abs=0.06)


def test_spread_by_hand():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 5.0, 7.0, torch.nan, torch.nan])
    valid = torch.tensor([True, True, True, True, True, False, False, False])
    assert texts_without_spread("abcd", rewards, valid, 2) == ["a", "c"]


def test_a_state_survives_being_written_down():
    state = CurriculumState(PromptCurriculum(), place=7, rests_until={"a": 3})
    again = CurriculumState(PromptCurriculum())
    again.restore(state.state())
    assert again == state
    assert CurriculumState().state() == {}


def test_a_recipe_names_it():
    settings = {"iterations": 1, "prompts_per_iteration": 1, "group_size": 2, "rollout_batch_size": 2}
    settings |= {"micro_batch_size": 2, "image_size": 8, "learning_rate": 0.1}
    read = build_part(TrainConfig, settings | {"curriculum": {"rest": 3}})
    assert read.curriculum == PromptCurriculum(rest=3)
    with pytest.raises(ValueError, match="rest"):
        build_part(TrainConfig, settings | {"curriculum": {"rest": 0}})
    with pytest.raises(ValueError, match="keep"):
        build_part(TrainConfig, settings | {"curriculum": {"keep": 1.0}})


def test_a_run_with_a_curriculum_is_resumed_bit_for_bit(tmp_path):
    recipe = clipped(curriculum=PromptCurriculum(rest=2), iterations=4, eval_every=0, eval_prompts=0)
    recipe = attrs.evolve(recipe, reward=OneOfThreeIsSolved())
    train(recipe, tmp_path / "whole")
    train(attrs.evolve(recipe, train=attrs.evolve(recipe.train, iterations=2)), tmp_path / "parts")
    train(recipe, tmp_path / "parts", resume="latest")
    whole, parts = (read_metrics(tmp_path / name, "train") for name in ("whole", "parts"))
    for one, other in zip(whole, parts, strict=True):
        clocks = {name for name in one if name.startswith(("seconds/", "beside_seconds/", "time"))}
        assert {k: v for k, v in one.items() if k not in clocks} == {k: v for k, v in other.items() if k not in clocks}
    assert next(row["curriculum/passed_over"] for row in whole) == 0
    assert max(row["curriculum/passed_over"] for row in whole) > 0
