"""A recipe that says only what it changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlt2i.config import ConfigError, read_yaml
from rlt2i.recipes import list_recipes, load_recipe
from rlt2i.recipes.extends import read_recipe

OWN = "name: mine\nabout: mine\nevidence: unrun\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_fields_change_parts_with_a_type_are_replaced_and_the_rest_stays(tmp_path: Path):
    # star-shapes: SDE(num_steps 10, window [0, 3], FlowSDE 0.9); ClippedSurrogate(2e-3, location); 30 updates.
    text = "extends: star-shapes\nsampler: {num_steps: 12, kernel: {type: CPS}}\nobjective: {type: Reinforce}\n"
    mine = load_recipe(written(tmp_path, OWN + text + "train: {iterations: 5}\ncredit: {allocations: []}\n"))
    star = load_recipe("star-shapes")
    assert (mine.name, mine.about, mine.evidence) == ("mine", "mine", "unrun")
    assert mine.sampler.num_steps == 12
    assert mine.sampler.window == star.sampler.window == (0, 3)  # type: ignore[attr-defined]
    assert type(mine.sampler.kernel).__name__ == "CPS"  # type: ignore[attr-defined]
    assert mine.sampler.kernel.noise_level == 0.8  # type: ignore[attr-defined]  # CPS's own default, not FlowSDE's 0.9
    assert type(mine.objective).__name__ == "Reinforce"
    assert mine.credit.allocations == ()  # type: ignore[attr-defined]
    assert mine.credit.advantage == star.credit.advantage  # type: ignore[attr-defined]
    assert mine.train.iterations == 5
    assert mine.train.learning_rate == star.train.learning_rate


def test_nothing_changed_is_the_same_recipe_under_another_name(tmp_path: Path):
    mine = load_recipe(written(tmp_path, OWN + "extends: star-shapes\n"))
    star = load_recipe("star-shapes")
    assert {**mine.mapping(), "name": 0, "about": 0, "evidence": 0} == {
        **star.mapping(),
        "name": 0,
        "about": 0,
        "evidence": 0,
    }
    assert "extends" not in mine.to_yaml()


def test_a_recipe_without_a_base_is_read_as_it_stands():
    for entry in list_recipes():
        if "extends" not in read_yaml(entry.path):
            assert read_recipe(entry.path) == read_yaml(entry.path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            OWN + "extends: star-shape\n",
            "extends: no shipped recipe is called 'star-shape'; did you mean 'star-shapes'?",
        ),
        (OWN + "extends: star-nft-sd35-geneval\n", "itself extends nft-sd35-geneval. Extend that one"),
        ("extends: star-shapes\n", "name: a recipe that extends another one says this of itself"),
        (OWN + "extends: star-shapes\ntrian: {}\n", "trian: Recipe has no such field; did you mean 'train'?"),
        (OWN + "extends: star-shapes\nobjective: {beta: 1.0}\n", "objective.beta: ClippedSurrogate has no such field"),
    ],
)
def test_mistakes_name_the_file_and_the_field(text: str, message: str, tmp_path: Path):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name", ["star-nft-sd35-geneval", pytest.param("mixgrpo-sd35-geneval", marks=pytest.mark.slow)]
)
def test_the_plan_of_a_recipe_that_extends_another_needs_no_weights(name: str):
    from rlt2i.training.dry_run import describe_run

    recipe = load_recipe(name)
    text = describe_run(recipe, world_size=2)
    assert text.startswith(f"{name}  {recipe.hash[:8]}  evidence: {recipe.evidence}")
    assert f"{recipe.train.prompts_per_iteration} prompts x {recipe.train.group_size} rollouts" in text
    assert "memory, " in text
