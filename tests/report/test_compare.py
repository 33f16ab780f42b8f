"""Comparisons: paired by seed, and no claim that the numbers do not carry."""

import csv
import json
import math
import xml.etree.ElementTree as ET

import pytest

from rlt2i.inputs.display import cell
from rlt2i.report import compare_runs
from rlt2i.report.compare import Difference


@pytest.fixture
def arms(make_run):
    """A factory: arm -> the rise of each seed."""

    def make(every: int = 9, updates: int = 27, **rises: list[float]):
        return {
            arm: [
                make_run(f"{arm}-{k}", seed=k, rise=rise, every=every, updates=updates, images=False, maps=False)
                for k, rise in enumerate(values)
            ]
            for arm, values in rises.items()
        }

    return make


def test_difference_by_hand():
    # Mean 2, standard deviation 1, SE 1/sqrt(3) = .577, t interval 2 +- 4.303 * .577.
    difference = Difference(arm="star", measure="final", values=[1.0, 2.0, 3.0])
    assert (difference.mean, difference.standard_error) == pytest.approx((2, 1 / math.sqrt(3)))
    assert difference.interval == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-3)
    assert difference.distinguishable
    assert "Suggestive, no more" in difference.sentence("uniform")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.02, -0.03, 0.01], "not distinguishable from uniform"),
        ([0.0, 0.0, 0.0], "not distinguishable from uniform"),
        ([0.1, 0.11, 0.09, 0.1], "above uniform, 95 % t interval"),
        ([-0.1, -0.11, -0.09, -0.1], "below uniform, 95 % t interval"),
        ([0.3], "nothing can be claimed"),
    ],
)
def test_sentences(values, words):
    assert words in Difference(arm="star", measure="final", values=values).sentence("uniform")


def test_a_comparison(arms, tmp_path):
    runs = arms(star=[0.2, 0.18, 0.22], uniform=[0.1, 0.09, 0.11], shuffled=[0.12, 0.06, 0.12], oracle=[0.1, 0.1, 0.1])
    made = compare_runs(runs, tmp_path / "out")
    rows = list(csv.DictReader(made.csv.open(encoding="utf-8")))
    assert len(rows) == 12
    assert (rows[0]["arm"], rows[0]["seed"], float(rows[0]["final"])) == ("star", "0", pytest.approx(0.67))
    star = next(d for d in made.differences if d.arm == "star" and d.measure == "final")
    assert star.values == pytest.approx([0.1, 0.09, 0.11])
    assert "star: final score +0.100" in made.sentence
    assert "shuffled: final score 0.000" in made.sentence.replace("+", "")
    assert "cannot rank spatial credit" in made.sentence
    assert "6 comparisons were made" in made.sentence
    root = ET.fromstring(made.svg.read_text(encoding="utf-8"))
    words = {n.text for n in root.iter() if n.tag.endswith("}text")}
    assert {f"{arm} (3 seeds)" for arm in runs} <= words
    text = made.text.read_text(encoding="utf-8")
    assert "| uniform | 3 | 0.470 | 0.570 |" in text
    assert "not distinguishable" in text


def test_area_under_the_curve_by_hand(tmp_path):
    run = tmp_path / "uniform"
    run.mkdir()
    points = ((0, 0.0), (10, 1.0), (30, 0.5))
    lines = [json.dumps({"phase": "eval", "step": step, "eval/strict": value}) for step, value in points]
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (outcome,) = compare_runs({"uniform": [run]}, tmp_path / "out").outcomes
    # (0 + 1)/2 * 10 + (1 + .5)/2 * 20 = 20, over 30 updates.
    assert outcome.mean == pytest.approx(2 / 3)


def test_runs_are_compared_where_all_were_evaluated(arms, tmp_path):
    runs = arms(uniform=[0.1, 0.1]) | arms(star=[0.2, 0.2], updates=18)
    made = compare_runs(runs, tmp_path / "out")
    assert {o.iteration for o in made.outcomes} == {18}
    assert "Not used: evaluations after iteration 18 of uniform-0, uniform-1." in made.sentence


def test_the_seed_is_that_of_training(arms, tmp_path):
    runs = arms(uniform=[0.1, 0.2], star=[0.3, 0.4])
    for number, path in ((5, runs["uniform"][0]), (5, runs["star"][1])):
        text = (path / "recipe.yaml").read_text(encoding="utf-8")
        (path / "recipe.yaml").write_text(f"{text}train: {{seed: {number}}}\n", encoding="utf-8")
    made = compare_runs(runs, tmp_path / "out")
    assert [(o.arm, o.seed) for o in made.outcomes] == [("uniform", 1), ("uniform", 5), ("star", 0), ("star", 5)]
    (final,) = [d.values for d in made.differences if d.measure == "final"]
    assert final == pytest.approx([0.4 - 0.1])  # seed 5 of both, whatever their places


def test_seeds_that_nobody_shares(arms, make_run, tmp_path):
    runs = arms(uniform=[0.1, 0.1])
    runs["star"] = [make_run("star-9", seed=9, images=False, maps=False)]
    sentence = compare_runs(runs, tmp_path / "out").sentence
    assert "No seed in common with uniform, hence no comparison: star." in sentence


def test_names_that_a_spreadsheet_would_run_are_text(arms, tmp_path):
    runs = {"=1+1": arms(a=[0.1])["a"], "@x": arms(b=[0.2])["b"]}
    made = compare_runs(runs, tmp_path / "out", baseline="=1+1")
    rows = list(csv.DictReader(made.csv.open(encoding="utf-8")))
    assert [row["arm"] for row in rows] == ["'=1+1", "'@x"]
    assert [cell(v) for v in (-0.5, "-0.5", "star", "+x")] == [-0.5, "'-0.5", "star", "'+x"]


def test_an_arm_cannot_turn_the_sentence_round(arms, tmp_path):
    runs = {"uniform": arms(a=[0.1])["a"], "s\u202etar": arms(b=[0.2])["b"]}
    made = compare_runs(runs, tmp_path / "out")
    written = made.sentence + made.text.read_text(encoding="utf-8") + made.svg.read_text(encoding="utf-8")
    assert "s\\u202etar" in written
    assert "\u202e" not in written


def test_refusals(arms, make_run, tmp_path):
    runs = arms(uniform=[0.1])
    with pytest.raises(ValueError, match="Name one of them"):
        compare_runs(runs, tmp_path, baseline="unifrom")
    with pytest.raises(ValueError, match="has no eval/nothing"):
        compare_runs(runs, tmp_path, metric="eval/nothing")
    with pytest.raises(ValueError, match="a seed counts once"):
        compare_runs({"uniform": [*runs["uniform"], make_run("again", images=False, maps=False)]}, tmp_path)
    with pytest.raises(ValueError, match="share 1 iterations"):
        compare_runs(runs | {"star": [make_run("other", updates=20, every=20, images=False, maps=False)]}, tmp_path)
    with pytest.raises(ValueError, match="has no run"):
        compare_runs({"uniform": []}, tmp_path)


def test_runs_on_other_data_are_named(arms, tmp_path):
    runs = arms(uniform=[0.1, 0.1], star=[0.2, 0.2])
    for arm, content in (("uniform", "a"), ("star", "a")):
        for run in runs[arm]:
            inputs = {"task.train": {"path": f"{run}/prompts.txt", "sha256": content}}
            (run / "inputs.json").write_text(json.dumps(inputs))
    assert "Not the same data" not in compare_runs(runs, tmp_path / "out").sentence
    (runs["star"][1] / "inputs.json").write_text(json.dumps({"task.train": {"path": "prompts.txt", "sha256": "b"}}))
    told = compare_runs(runs, tmp_path / "out")
    said = "Not the same data: task.train had 2 different contents (uniform-0, uniform-1, star-0; star-1)."
    assert said in told.sentence
    assert said in told.text.read_text(encoding="utf-8")
