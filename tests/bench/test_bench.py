"""A benchmark from plan to page: shared starts, paired trials, kill -9, and verdicts on arms that are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest

from rlt2i.bench.analysis import Results, compare, network_evaluations, read_results, remarks, trend, trend_lines
from rlt2i.bench.curves import area, at, until
from rlt2i.bench.folder import TABLES, BenchFolder, read_table
from rlt2i.bench.plan import Arm, Plan, Trend, load_plan, shipped_plans
from rlt2i.bench.publish import publish
from rlt2i.cli import main
from rlt2i.config import ConfigError, dump_yaml, to_mapping
from tests.helpers.toy_recipe import clipped

TOY = "tests.helpers.toy_recipe:clipped"
SAME_TO_THE_BYTE = ("scores.csv", "evaluations.csv", "training.csv")


def toy_plan(**fields: object) -> Plan:
    """Two arms that are the same but for their name, on the toy policy."""
    plan = Plan(
        name="toy",
        question="Do two arms that are the same come out the same?",
        arms={"uniform": Arm(recipe=TOY), "copy": Arm(recipe=TOY, label="the same again")},
        reference="uniform",
        seeds=3,
        margin=0.01,
        set={"credit.allocations": [], "train.iterations": 3},
    )
    return attrs.evolve(plan, **fields)


def write(plan: Plan, path: Path) -> Path:
    path.write_text(dump_yaml(to_mapping(plan, typed=False)))
    return path


def bench(plan: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "rlt2i", "bench", str(plan), "--out", str(out), *options]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy benchmark that ran without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = bench(write(toy_plan(), folder / "toy.yaml"), folder / "out", "--jobs", "2")
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return folder / "out"


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_it_is_the_same_to_the_byte(undisturbed: Path, tmp_path: Path):
    plan, out = write(toy_plan(seeds=1), tmp_path / "toy.yaml"), tmp_path / "out"
    first, folder = bench(plan, out), BenchFolder(path=out)
    trial = folder.trial("copy", 0)
    deadline = time.monotonic() + 600
    try:
        while not list(trial.glob("run/checkpoint-*1")):  # the second trial has finished an iteration, not its last
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert folder.finished("uniform", 0)
    second = bench(plan, out)
    text, _ = second.communicate()
    assert second.returncode == 0, text
    assert "1 of 2 trials are finished" in text
    for arm in ("uniform", "copy"):
        for table in SAME_TO_THE_BYTE:
            whole = BenchFolder(path=undisturbed).trial(arm, 0) / table
            assert (folder.trial(arm, 0) / table).read_bytes() == whole.read_bytes(), (arm, table)


@pytest.mark.slow
def test_arms_that_are_the_same_are_called_equivalent(undisturbed: Path):
    rows = {row["measure"]: row for row in read_table(undisturbed / "differences.csv")}
    assert rows["final"]["mean"] == "0"
    assert rows["final"]["verdict"] == "equivalent"
    assert (
        "the same again against uniform: +0.000 [+0.000, +0.000], 3 seeds: equivalent"
        in (undisturbed / "sentence.txt").read_text()
    )
    page = (undisturbed / "index.html").read_text()
    assert "<svg" in page
    assert "Do two arms that are the same" in page


@pytest.mark.slow
def test_what_is_left_of_a_trial(undisturbed: Path):
    folder = BenchFolder(path=undisturbed)
    kept = {path.name for path in folder.trial("copy", 1).iterdir()}
    assert kept == {"done.json", "log.txt", *(f"{table}.csv" for table in TABLES)}
    results = read_results(undisturbed, toy_plan())
    assert sorted(results.samples.items()) == [(0, 0), (2, 32), (3, 48)]  # 4 prompts x 4 rollouts an iteration
    # The common start was judged once: iteration 0 is the same of all trials, and later ones are not.
    curves = results.main
    assert len({curve[0] for curve in curves.values()}) == 1
    assert curves["copy", 0][3] != curves["copy", 1][3]
    # Six held-out prompts with three different texts.
    assert {prompt: images for prompt, (images, _) in results.scores["copy", 1].items()} == {0: 2, 1: 2, 2: 2}


@pytest.mark.slow
def test_more_seeds_keep_those_that_are_finished(undisturbed: Path, tmp_path: Path):
    done = BenchFolder(path=undisturbed).trial("copy", 1) / "done.json"
    before = done.stat().st_mtime_ns
    changed = toy_plan(arms={"uniform": Arm(recipe=TOY), "copy": Arm(recipe=TOY, set={"train.learning_rate": 0.01})})
    process = bench(write(changed, tmp_path / "other.yaml"), undisturbed)
    text, _ = process.communicate()
    assert process.returncode == 2
    assert "the arm 'copy' was begun with another recipe" in text
    assert done.stat().st_mtime_ns == before


@pytest.mark.slow
def test_trials_of_the_same_recipe_are_taken_from_another_benchmark(undisturbed: Path, tmp_path: Path):
    arms = {"uniform": Arm(recipe=TOY), "again": Arm(recipe=TOY), "other": Arm(recipe=TOY, set={"train.seed": 7})}
    arms["fast"] = Arm(recipe=TOY, set={"train.learning_rate": 0.01})
    plan, out = toy_plan(name="second", arms=arms, seeds=2), tmp_path / "out"
    process = bench(write(plan, tmp_path / "plan.yaml"), out, "--reuse", str(undisturbed))
    text, _ = process.communicate()
    assert process.returncode == 0, text
    # A trial's seed is the plan's, whatever its arm sets, so three of the four arms are there already.
    assert f"6 trials taken from {undisturbed}" in text
    assert "6 of 8 trials are finished" in text
    mine, theirs = BenchFolder(path=out), BenchFolder(path=undisturbed)
    for seed in range(2):
        facts = json.loads((mine.trial("again", seed) / "done.json").read_text())
        assert facts["arm"] == "again"
        source = Path(facts["taken_from"])
        assert source in {theirs.trial(arm, seed) for arm in ("uniform", "copy")}
        for table in TABLES:
            taken = (mine.trial("again", seed) / f"{table}.csv").read_text()
            assert taken.replace("again,", f"{source.name[:-3]},") == (source / f"{table}.csv").read_text()
    assert "taken_from" not in json.loads((mine.trial("fast", 1) / "done.json").read_text())
    # Asked again, nothing is left to take.
    assert mine.take(theirs, plan) == []


@pytest.mark.slow
def test_trials_with_another_number_of_threads_are_not_taken(undisturbed: Path, tmp_path: Path):
    plan, mine = toy_plan(threads=2), BenchFolder(path=tmp_path)
    mine.prepare(plan, plan.recipes())
    with pytest.raises(ConfigError, match=r"ran with 1 threads .* this plan asks for 2; .*--set threads=1"):
        mine.take(BenchFolder(path=undisturbed), plan)


def test_a_folder_without_a_benchmark_is_not_reused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere: no benchmark to reuse, as it holds no plan\.yaml"):
        BenchFolder(path=tmp_path).take(BenchFolder(path=tmp_path / "nowhere"), toy_plan())


def test_arms_must_share_samples_and_start():
    arms = {"uniform": Arm(recipe=TOY), "longer": Arm(recipe=TOY, set={"train.iterations": 5})}
    with pytest.raises(ConfigError, match=r"arms\.longer: train\.iterations is 5, and 4 in the reference uniform"):
        toy_plan(arms=arms, set={}).recipes()
    with pytest.raises(ConfigError, match=r"arms\.longer: .*learning_rat"):
        toy_plan(arms={**arms, "longer": Arm(recipe=TOY, set={"train.learning_rat": 1})}).recipe("longer")


def test_network_evaluations_by_hand():
    # 16 rollouts of 5 steps; 3 of them are trained: forward, backward as two, and the reference of the penalty.
    assert network_evaluations(clipped()) == 16 * (5 + 3 * (3 + 1))


def test_curves_between_their_points():
    curve = {0: 0.0, 2: 1.0, 6: 3.0}
    assert area(curve) == pytest.approx((1.0 + 8.0) / 6)  # trapezoids of 1 and 8 over six iterations
    assert [at(curve, x) for x in (-1, 1, 4, 9)] == [0.0, 0.5, 2.0, 3.0]
    assert until(curve, 4) == {0: 0.0, 2: 1.0, 4: 2.0}
    assert area(until(curve, 4)) == pytest.approx((1.0 + 3.0) / 4)


def test_the_command_looks_at_a_plan_without_running_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", str(write(toy_plan(), tmp_path / "toy.yaml")), "--dry-run"]) == 0
    assert "6 trials: 3 seeds of 2 arms" in capsys.readouterr().out
    for name in ("lab", "probe"):
        with pytest.raises(SystemExit) as left:
            main(["bench", name, "--help"])
        assert left.value.code == 0


@pytest.mark.parametrize("what", [["--power"], ["--judge"], ["--publish", "there"]])
def test_tables_of_a_benchmark_that_was_not_run_are_refused_with_what_to_do(what: list[str], tmp_path: Path, capsys):
    write(toy_plan(), tmp_path / "toy.yaml")
    assert main(["bench", str(tmp_path / "toy.yaml"), "--out", str(tmp_path / "out"), *what]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'out'}: no results are there. Run `rlt2i bench" in said


@pytest.mark.slow
def test_the_command_says_how_many_seeds_a_difference_needs(undisturbed: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", str(undisturbed.parent / "toy.yaml"), "--out", str(undisturbed), "--power"]) == 0
    said = capsys.readouterr().out
    assert "seeds needed to find a true difference" in said
    assert "every seed gave the same difference" in said  # the two arms are the same


def test_seed_major_order():
    assert toy_plan(first_seed=5, seeds=2).trials == [("uniform", 5), ("copy", 5), ("uniform", 6), ("copy", 6)]


def test_plans_refuse_early(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such plan; did you mean 'shapes-clipped'"):
        load_plan("shapes-clippd")
    with pytest.raises(ValueError, match="no such arm; did you mean 'uniform'"):
        toy_plan(reference="unifrom")
    path = write(toy_plan(), tmp_path / "p.yaml")
    path.write_text(path.read_text().replace("margin: 0.01", "margin: 0.0"))
    with pytest.raises(ConfigError, match="margin"):
        load_plan(path)


def test_an_oracle_without_a_lead_is_said_and_what_follows_from_it():
    def remarked(star: list[float], oracle: list[float]) -> list[str]:
        arms = {"uniform": [0.50, 0.70, 0.60, 0.65], "star": star, "oracle": oracle}
        plan = toy_plan(arms={name: Arm(recipe=TOY) for name in arms}, reference="uniform", seeds=4)
        curves = {(arm, seed): {0: 0.0, 2: v} for arm, values in arms.items() for seed, v in enumerate(values)}
        empty: dict[tuple[str, int], float] = {}
        results = Results(
            plan=plan,
            curves={"strict": curves},
            seconds=empty,
            credit_seconds=empty,
            cost=dict.fromkeys(arms, 1),
            samples={0: 0, 2: 1},
            scores={},
        )
        return remarks(results, compare(results))

    ahead, level = [0.60, 0.81, 0.70, 0.75], [0.52, 0.68, 0.61, 0.64]
    assert remarked(star=ahead, oracle=ahead) == []
    assert remarked(star=ahead, oracle=level) == ["The oracle is not shown to be better than uniform."]
    (line,) = remarked(star=level, oracle=level)
    assert line.endswith("as run, this benchmark cannot rank spatial credit.")


def ladder(scores: dict[str, list[float]], **fields: object) -> Results:
    """A benchmark of three arms at 0.5, 0.7 and 1.0 of a map's quality, with these scores by seed, from 0."""
    levels = {"poor": 0.5, "fair": 0.7, "good": 1.0}
    plan = toy_plan(
        arms={name: Arm(recipe=TOY) for name in levels},
        reference="poor",
        trend=Trend(over="the map's quality", levels=levels),
        **fields,
    )
    curves = {(arm, seed): {0: 0.0, 2: value} for arm, values in scores.items() for seed, value in enumerate(values)}
    return Results(
        plan=plan,
        curves={"strict": curves},
        seconds={},
        credit_seconds={},
        cost=dict.fromkeys(levels, 1),
        samples={0: 0, 2: 1},
        scores={},
    )


def test_a_trend_is_told_from_the_slopes_of_its_seeds():
    rising = ladder({"poor": [0.50, 0.70, 0.60], "fair": [0.54, 0.745, 0.635], "good": [0.60, 0.80, 0.70]})
    assert (d := trend(rising)) is not None
    assert d.mean == pytest.approx(0.2, abs=0.01)
    first, second = trend_lines(rising)
    assert first.startswith("strict after iteration 2, from 0.5 to 1 of the map's quality: +0.100 [+0.09")
    assert "3 seeds: rises" in first
    assert "on average over training" in second
    assert ": +0.050 " in second  # curves rise from 0 in a line

    flat = ladder({"poor": [0.5, 0.7, 0.6], "fair": [0.6, 0.7, 0.5], "good": [0.4, 0.8, 0.6]})
    assert "no trend shown" in trend_lines(flat)[0]
    falling = ladder({"poor": [0.60, 0.81, 0.70], "fair": [0.56, 0.76, 0.66], "good": [0.50, 0.70, 0.60]})
    assert "falls" in trend_lines(falling)[0]


def test_seeds_without_all_arms_of_a_trend_do_not_count():
    part = ladder({"poor": [0.5, 0.7, 0.6], "fair": [0.5, 0.7], "good": [0.6, 0.8, 0.7]})
    assert (d := trend(part)) is not None
    assert d.seeds == 2
    assert trend_lines(part)[0].endswith("2 seeds, too few to claim anything.")
    assert trend(ladder({"poor": [0.5], "fair": [], "good": [0.6]})) is None
    assert trend_lines(ladder({"poor": [0.5], "fair": [], "good": [0.6]})) == []


def test_trends_refuse_what_is_no_line(tmp_path: Path):
    with pytest.raises(ValueError, match="three arms or more"):
        Trend(over="x", levels={"uniform": 0.0, "copy": 1.0})
    with pytest.raises(ValueError, match="not all at one level"):
        Trend(over="x", levels={"a": 1.0, "b": 1.0, "c": 1.0})
    with pytest.raises(ValueError, match=r"trend.levels: 'b'.*no such arm"):
        toy_plan(trend=Trend(over="x", levels={"uniform": 0.0, "b": 1.0, "copy": 2.0}))
    plan = load_plan("cells-maps")
    assert load_plan(write(plan, tmp_path / "again.yaml")).trend == plan.trend


@pytest.mark.parametrize("name", shipped_plans())
def test_shipped_plans_have_arms_that_can_be_paired(name: str):
    recipes = load_plan(name).recipes()
    assert len({recipe.hash for recipe in recipes.values()}) == len(recipes)


@pytest.mark.slow
def test_published_tables_say_the_same_as_the_whole(undisturbed: Path, tmp_path: Path):
    said = publish(undisturbed, toy_plan(), tmp_path / "published")
    assert said + "\n" == (undisturbed / "sentence.txt").read_text()
    assert (tmp_path / "published" / "differences.csv").read_bytes() == (undisturbed / "differences.csv").read_bytes()
    whole, kept = read_results(undisturbed, toy_plan()), read_results(tmp_path / "published", toy_plan())
    assert kept.scores == whole.scores
    assert kept.seconds == pytest.approx(whole.seconds, rel=1e-4)
