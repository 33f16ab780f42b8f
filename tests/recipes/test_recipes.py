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
from rlt2i.runs.belonging import continuity
from rlt2i.runs.files import plain_json
from rlt2i.tasks.base import Task
from rlt2i.tasks.pairs import PairFileTask
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
    assert recipe.reward.metadata_keys <= recipe.task.provides


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batches_of_shipped_recipes_work_out_on_usual_machines(name: str, world_size: int):
    derive_batch(load_recipe(name).train, world_size=world_size, num_steps=10, trained_steps=9)


@pytest.mark.parametrize("entry", list_recipes(), ids=NAMES)
def test_shipped_recipes_state_their_evidence_and_it_is_there(entry: Any):
    assert entry.about
    assert len(entry.about) <= 100
    assert entry.evidence in {"gated", "curve", "smoke", "rehearsed", "unrun"}
    curves = [*CURVES.glob(f"{entry.name}.csv"), *CURVES.glob(f"{entry.name}-s*.csv")]
    if entry.evidence in {"gated", "curve"}:
        assert curves, f"{entry.name} claims a curve; commit it as {CURVES / entry.name}.csv (or -s<seed>.csv)"
    if "sd35" in entry.name and not curves:
        assert entry.evidence in {"rehearsed", "unrun"}, "nobody has run this recipe with its real weights"


@pytest.mark.parametrize("path", sorted(CURVES.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_curves_are_of_the_shipped_recipes(path: Path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    (recipe, seed, found), *others = {(row["recipe"], row["seed"], row["hash"]) for row in rows}
    assert not others
    assert path.stem == f"{recipe}-s{seed}"
    assert found == load_recipe(recipe, [f"train.seed={seed}"]).hash[:12], (
        f"{recipe} has changed since {path.name} was measured: run it again with `rlt2i train {recipe}`, then "
        "python -m benchmarks.curve RUN"
    )


@pytest.mark.parametrize("family", [r"\w+-shapes", r"\w+-nft-shapes", r"(?!nft)\w+-cells", r"(\w+-)?nft-cells"])
def test_compared_recipes_differ_in_credit_alone(family: str):
    arms = ("star", "uniform", "shuffled", "inverted", "oracle", "nft-cells")
    names = [name for name in NAMES if re.fullmatch(family, name) and name.startswith(arms)]
    assert len(names) >= 2
    rest = [
        {k: v for k, v in load_recipe(n).mapping().items() if k not in ("name", "about", "evidence", "credit")}
        for n in names
    ]
    assert all(other == rest[0] for other in rest[1:]), names


def test_every_short_name_leads_to_a_part_of_its_kind():
    for kind, table in PARTS.items():
        for name, reference in table.items():
            cls = load_object(reference)
            assert cls.__name__ == name
            assert attrs.has(cls)
            assert kind in {base.__name__ for base in cls.__mro__}, f"{name} is no {kind}"


def test_every_part_that_ships_has_a_short_name():
    kinds = {
        interfaces.PolicySpec,
        interfaces.Sampler,
        interfaces.Reward,
        interfaces.CreditAssigner,
        interfaces.Objective,
    }
    kinds |= {TransitionKernel, Advantage, Allocation, Mask, Task}
    unnamed = []
    for folder in ("samplers", "credit", "objectives", "rewards", "policies", "tasks"):
        package = importlib.import_module(f"rlt2i.{folder}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for name, cls in vars(importlib.import_module(found.name)).items():
                if inspect.isclass(cls) and cls.__module__ == found.name and not name.startswith("_"):
                    bases = {kind.__name__ for kind in kinds if issubclass(cls, kind)} if attrs.has(cls) else set()
                    if bases and not inspect.isabstract(cls) and not any(name in PARTS.get(b, {}) for b in bases):
                        unnamed.append(f"{found.name}:{name}")
    assert not unnamed, f"add to rlt2i/recipes/parts.py: {unnamed}"


def test_short_names_are_unique():
    names = [name for table in PARTS.values() for name in table]
    assert len(names) == len(set(names))


def test_listing_imports_no_torch():
    code = "import sys; from rlt2i.recipes import list_recipes; list_recipes(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------------ what a recipe may be


def test_a_yaml_path_and_python_give_the_same_recipe(tmp_path: Path):
    (tmp_path / "toy.yaml").write_text(TOY)
    (tmp_path / "toy_recipe.py").write_text(
        "from tests.recipes.test_recipes import toy\n\ndef recipe():\n    return toy()\n\ndef broken():\n    return 3\n"
    )
    from_yaml = load_recipe(tmp_path / "toy.yaml")
    from_python = load_recipe(f"{tmp_path}/toy_recipe.py:recipe")
    assert from_yaml == from_python == toy()
    assert from_yaml.hash == from_python.hash
    with pytest.raises(ConfigError, match="broken: returned int, expected a Recipe"):
        load_recipe(f"{tmp_path}/toy_recipe.py:broken")


def test_the_recipe_of_a_run_can_be_run_again(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(toy().to_yaml())
    assert load_recipe(tmp_path) == toy()


def test_what_is_watched_does_not_count_and_is_written_down(tmp_path: Path):
    watched = recipe_from_mapping(parse_yaml(TOY + "heldout: {size: JPEGCompressibility}\n"))
    assert watched.hash == toy().hash
    assert continuity(watched) == continuity(toy())
    assert recipe_from_mapping(parse_yaml(watched.to_yaml())) == watched
    assert load_recipe_with(tmp_path, "heldout.size.quality=50").heldout["size"].quality == 50  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="the name becomes the metric eval/heldout/a b"):
        recipe_from_mapping(parse_yaml(TOY + "heldout: {a b: JPEGCompressibility}\n"))


def load_recipe_with(folder: Path, override: str) -> Recipe:
    (folder / "watched.yaml").write_text(TOY + "heldout: {size: JPEGCompressibility}\n")
    return load_recipe(folder / "watched.yaml", [override])


def test_overrides_go_through_the_same_checks(tmp_path: Path):
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    changed = load_recipe(path, ["credit.mix=1", "train.seed=3", "objective.type=DiffusionNFT"])
    assert changed.credit.allocations[0].mix == 1.0  # type: ignore[attr-defined]
    assert changed.train.seed == 3
    assert type(changed.objective).__name__ == "DiffusionNFT"
    assert changed.hash != toy().hash
    with pytest.raises(
        ConfigError, match=r"credit\.allocations\[0\]\.mix: got 2\.0 \(float\), expected float in \[0, 1\]"
    ):
        load_recipe(path, ["credit.mix=2"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("group_size: 4", "group_size: 1", "train: group_size=1: ClippedSurrogate learns from advantages"),
        ("iterations: 2", "iterations: 0", "train.iterations: got 0 (int), expected int >= 1"),
        ("name: toy", "name: Toy!", "name: Recipe(name='Toy!'): run directories start with it"),
        ("about: a toy", "abuot: a toy", "abuot: Recipe has no such field; did you mean 'about'?"),
        ("evidence: smoke", "evidence: proven", "evidence: got 'proven' (str), expected 'gated' or 'curve' or"),
        ("type: SDE", "type: SED", "sampler.type: unknown Sampler 'SED'; did you mean 'SDE'?"),
        ("window: [0, 2]", "window: [0, 9]", "sampler: SDE(window=(0, 9), num_steps=4)"),
        ("betas", "betas", ""),
    ],
)
def test_a_bad_recipe_file_names_file_and_field(old: str, new: str, message: str, tmp_path: Path):
    path = tmp_path / "toy.yaml"
    path.write_text(TOY.replace(old, new))
    if not message:
        assert load_recipe(path) == toy()
        return
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("star-shape", "unknown recipe 'star-shape'; did you mean 'star-shapes'? Shipped: "),
        ("nowhere/to/be.yaml", "be.yaml: no such recipe file"),
        ("no_such_module:recipe", "there is no module 'no_such_module' on the path"),
    ],
)
def test_an_unknown_recipe_says_what_there_is(name: str, message: str):
    with pytest.raises(ConfigError) as caught:
        load_recipe(name)
    assert message in str(caught.value)


def test_parts_can_be_built_alone():
    from rlt2i.interfaces import Sampler

    assert build_part(Sampler, {"type": "ODE", "num_steps": 3}).num_steps == 3


def test_the_folder_of_recipes_holds_nothing_else():
    assert {path.suffix for path in FOLDER.iterdir() if path.is_file()} <= {".py", ".yaml"}


# -------------------------------------------------------------------------------------------------- batch arithmetic

TRAIN = TrainConfig(
    iterations=10,
    prompts_per_iteration=12,
    group_size=16,
    optimizer_steps_per_iteration=2,
    rollout_batch_size=40,
    micro_batch_size=64,
    image_size=32,
    learning_rate=1e-4,
)


def test_batch_arithmetic_by_hand():
    # 12 prompts x 16 = 192 rollouts on 3 processes: 64 each, sampled as 40 + 24.
    # Two optimiser steps of 96 rollouts, 32 a device, x 3 steps = 96 pairs = 64 + 32.
    plan = derive_batch(TRAIN, world_size=3, num_steps=10, trained_steps=3)
    assert (plan.rollouts, plan.prompts_per_device, plan.rollouts_per_device, plan.rollout_passes) == (192, 4, 64, 2)
    assert (plan.rollouts_per_step, plan.micro_batches) == (96, 2)
    assert (plan.total_rollouts, plan.total_optimizer_steps) == (1920, 20)
    assert "12 prompts x 16 rollouts = 192 images" in plan.table()


def test_a_batch_smaller_than_the_chunk_is_one_pass():
    plan = derive_batch(attrs.evolve(TRAIN, rollout_batch_size=1000), world_size=6, num_steps=10, trained_steps=3)
    assert (plan.rollout_batch_size, plan.rollout_passes) == (32, 1)


def test_groups_that_cannot_be_shared_out_evenly_are_refused_with_the_nearest_that_can():
    with pytest.raises(ValueError, match="cannot be shared out") as caught:
        derive_batch(TRAIN, world_size=4, num_steps=10, trained_steps=3)
    text = str(caught.value)
    assert "train.prompts_per_iteration=12 cannot be shared out to 4 processes x 2 optimiser steps" in text
    assert "must be a multiple of 8. Use train.prompts_per_iteration=8 or 16, or 1, 2, 3 or 6 processes." in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "group_size"),
        ({"betas": (0.9, 1.0)}, "both must lie in"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_invalid_share": 1.5}, "max_invalid_share"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
    ],
)
def test_train_config_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        attrs.evolve(TRAIN, **changes)
