"""Reference bands: the interval by hand, and what is said of a run inside and outside of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
import pytest

from rlt2i.bench.reference import FOLDER, Band, compare_with_band, load_band, prediction_interval
from rlt2i.config import ConfigError
from rlt2i.recipes.recipe import load_recipe
from tests.helpers.toy_recipe import clipped

TOY = "tests.helpers.toy_recipe:clipped"


def band(**points: tuple[float, float, float]) -> Band:
    at_zero = attrs.evolve(clipped(), train=attrs.evolve(clipped().train, seed=0))
    return Band(
        recipe=TOY, set={}, hash=at_zero.hash, metric="strict", seeds=4,
        points={int(step.removeprefix("at")): point for step, point in points.items()},
    )  # fmt: skip


def run_with(folder: Path, values: dict[int, float], **train: object) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(clipped(**train).to_yaml())
    lines = [{"step": step, "phase": "eval", "time": "", "eval/strict": value} for step, value in values.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_prediction_interval_by_hand():
    # Mean 2, standard deviation 1, t(.975, 2) = 4.3027: 4.3027 sqrt(4/3) to both sides.
    low, mean, high = prediction_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert high - mean == pytest.approx(4.30265 * math.sqrt(4 / 3), abs=1e-4)
    assert mean - low == pytest.approx(high - mean)
    with pytest.raises(ValueError, match="two or more"):
        prediction_interval([1.0])


def test_inside_and_outside(tmp_path: Path):
    wanted = band(at2=(0.4, 0.5, 0.6), at4=(0.6, 0.7, 0.8))
    text = compare_with_band(run_with(tmp_path / "a", {0: 0.3, 2: 0.55, 4: 0.61}, seed=7), wanted)
    assert "Inside of the band at all 2 iterations" in text
    assert "note" not in text
    text = compare_with_band(run_with(tmp_path / "b", {2: 0.55, 4: 0.59}), wanted)
    assert "Outside of the band: first at iteration 4, below it (1 of 2)" in text


def test_a_run_of_another_recipe_is_told(tmp_path: Path):
    run = run_with(tmp_path / "a", {2: 0.5}, learning_rate=0.01)
    assert "the run differs from the band's recipe in train.learning_rate" in compare_with_band(
        run, band(at2=(0.4, 0.5, 0.6))
    )
    with pytest.raises(ConfigError, match=r"logged at iterations \[2\], the band .* is at \[3\]"):
        compare_with_band(run, band(at3=(0.4, 0.5, 0.6)))


def test_shipped_bands_are_of_recipes_as_they_are():
    for name in sorted(path.stem for path in FOLDER.glob("*.json")):
        shipped = load_band(name)
        recipe = load_recipe(name, [f"{key}={json.dumps(value)}" for key, value in shipped.set.items()])
        assert attrs.evolve(recipe, train=attrs.evolve(recipe.train, seed=0)).hash == shipped.hash, name
    with pytest.raises(ConfigError, match="no band ships"):
        load_band("star-sd35-geneval")
