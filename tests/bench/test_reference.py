"""Reference bands: the interval by hand, and what is said of a run inside and outside of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
import pytest

from rlt2i.bench.analysis import Results
from rlt2i.bench.plan import Arm, Plan
from rlt2i.bench.reference import FOLDER, Band, compare_with_band, load_band, prediction_interval, write_bands
from rlt2i.cli import main
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


def test_bands_are_made_of_arms_with_five_seeds(tmp_path: Path):
    """From a benchmark's results to a file, and from the file to what is said of a sixth run."""
    plan = Plan(
        name="toy",
        question="?",
        arms={
            "star": Arm(recipe=TOY, set={"train.learning_rate": 0.05}),
            "few": Arm(recipe=TOY, set={"train.seed": 0}),
        },
        reference="star",
        margin=0.01,
    )
    final = [0.70, 0.72, 0.74, 0.76, 0.78]
    curves = {("star", seed): {0: 0.4, 2: 0.5 + 0.01 * seed, 4: value} for seed, value in enumerate(final)}
    curves |= {("few", seed): {0: 0.4, 2: 0.5, 4: 0.6} for seed in range(4)}
    results = Results(
        plan=plan, curves={"strict": curves}, seconds={}, credit_seconds={}, cost={"star": 1, "few": 1},
        samples={0: 0, 2: 32, 4: 64}, scores={},
    )  # fmt: skip
    (file,) = write_bands(results, tmp_path / "bands")
    made = load_band(file.stem, tmp_path / "bands")
    assert made.seeds == 5
    assert sorted(made.points) == [2, 4]  # iteration 0 is the same in all
    # Standard deviation sqrt(.001), t(.975, 4) = 2.7764, a new run: sqrt(1 + 1/5).
    assert made.points[4][2] - 0.74 == pytest.approx(2.7764 * math.sqrt(0.001) * math.sqrt(1.2), abs=1e-4)
    inside = compare_with_band(run_with(tmp_path / "a", {2: 0.53, 4: 0.75}), made)
    assert "Inside of the band at all 2 iterations" in inside
    assert "note" not in inside
    outside = compare_with_band(run_with(tmp_path / "b", {2: 0.52, 4: 0.60}), made)
    assert "Outside of the band: first at iteration 4, below it (1 of 2)" in outside


def test_the_command_asks_for_a_band_that_ships(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = run_with(tmp_path / "a", {2: 0.53})
    assert main(["compare", str(run), "--reference", "no-such-recipe"]) == 2
    assert "no band ships for it" in capsys.readouterr().err


def test_shipped_bands_are_of_recipes_as_they_are():
    for name in sorted(path.stem for path in FOLDER.glob("*.json")):
        shipped = load_band(name)
        recipe = load_recipe(name, [f"{key}={json.dumps(value)}" for key, value in shipped.set.items()])
        assert attrs.evolve(recipe, train=attrs.evolve(recipe.train, seed=0)).hash == shipped.hash, name
    with pytest.raises(ConfigError, match="no band ships"):
        load_band("star-sd35-geneval")
