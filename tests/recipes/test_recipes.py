"""The shipped recipes, and what a recipe may be."""

from __future__ import annotations

import csv
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from rlt2i import interfaces
from rlt2i.config import ConfigError, load_object, parse_yaml
from rlt2i.credit.algebra import Advantage, Allocation, Mask
from rlt2i.recipes import PARTS, Recipe, build_part, list_recipes, load_recipe, recipe_from_mapping
from rlt2i.recipes.catalogue import FOLDER
from rlt2i.recipes.train_config import TrainConfig, derive_batch
from rlt2i.runs.files import plain_json
from rlt2i.tasks.base import Task
from rlt2i.tasks.pairs import PairFileTask
from rlt2i.training.trainer import continuity
from rlt2i.types import TransitionKernel

ROOT = Path(__file__).resolve().parents[2]
CURVES = ROOT / "benchmarks" / "curves"
NAMES = [entry.name for entry in list_recipes()]

TOY = """
name: toy
about: a toy
evidence: smoke
policy: {type: "tests.helpers.toy:ToySpec"}
sampler: {type: SDE, num_steps: 4, window: [0, 2]}
reward: {type: "tests.helpers.toy:QuadrantBrightness"}
credit: {type: Product, advantage: GroupRelative, allocations: [{type: TextAttention, mix: 0.5}]}
objective: {type: ClippedSurrogate, clip_range: 1e-3}
task: {type: "tests.helpers.toy:ToyTask"}
train:
  {iterations: 2, prompts_per_iteration: 4, group_size: 4, rollout_batch_size: 8, micro_batch_size: 16, image_size: 8,
   learning_rate: 1e-2, eval_prompts: 6, trackers: []}
"""


def toy() -> Recipe:
    return recipe_from_mapping(parse_yaml(TOY))


# --------------------------------------------------------------------------------------------------- shipped recipes


def test_there_are_recipes_and_their_files_bear_their_names():
    assert {"star-shapes", "star-nft-shapes", "uniform-shapes", "star-sd35-geneval", "flow-grpo-sd35-geneval"} <= set(
        NAMES
    )
    assert [entry.path.stem for entry in list_recipes()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_parse_and_round_trip(name: str):
    recipe = load_recipe(name)
    again = recipe_from_mapping(parse_yaml(recipe.to_yaml()))
    assert again == recipe
    assert again.hash == recipe.hash
    assert recipe.name == name
    plain_json(recipe.mapping(), "recipe")  # a run writes it down


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_are_algorithms_whose_parts_fit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = load_recipe(name)
    recipe.algorithm().check_group_size(recipe.train.group_size)
    if isinstance(recipe.task, PairFileTask):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match="rlt2i pairs RECIPE FOLDER"):
            _ = recipe.task.provides
        return
    recipe.task.check_image_size(recipe.train.image_size)
