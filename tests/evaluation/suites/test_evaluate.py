"""Evaluations of the toy policy: any order, any share, any interruption, the same images and numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from rlt2i.evaluation.inspection import load_policy
from rlt2i.evaluation.suites import Suite
from rlt2i.evaluation.suites.evaluate import base_beside, evaluate_suite
from rlt2i.evaluation.suites.folder import EvaluationError, Folder, Shard
from rlt2i.evaluation.suites.report import Report
from rlt2i.evaluation.suites.suite import drawings
from rlt2i.rewards.jpeg import JPEGIncompressibility
from rlt2i.training.start import train
from tests.helpers import toy_recipe
from tests.helpers.suite_parts import Brightness, Corners, suite

ROOT = Path(__file__).resolve().parents[3]
RECIPE = toy_recipe.clipped()


def silent(_: str) -> None:
    """Nobody listens."""


def run(out: Path, recipe: Any = RECIPE, measured: Suite | None = None, **options: Any) -> Report | None:
    return evaluate_suite(recipe, measured or suite(), out=out, say=options.pop("say", silent), **options)


def process(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.helpers.suite_draw", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def content(folder: Path) -> dict[str, bytes]:
    """Images and results; parts may be cut differently."""
    kept = [*sorted((folder / "images").iterdir()), folder / "results.jsonl", folder / "report.md"]
    return {path.name: path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, evaluated without interruption in a process of its own."""
    folder = tmp_path_factory.mktemp("evaluations") / "whole"
    done = process(str(folder))
    assert done.returncode == 0, done.stderr
    return folder


# --------------------------------------------------------------------------------------------------------- one run


def test_an_evaluation_leaves_images_results_and_a_report(whole: Path):
    rows = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{n:05d}-{i:02d}" for n in range(10) for i in range(3)]
    assert rows[29]["prompt"] == "corner 9"
    assert len(list((whole / "images").iterdir())) == 30
    report = json.loads((whole / "report.json").read_text())
    said = report["rewards"]["brightness"]
    assert said["invalid"] == 3
    assert said["measures"]["score"]["mean"]["values"] == 27
    # The mean by hand: of the categories' means, without the three images that could not be judged.
    known = [(r["category"], r["scores"]["brightness"]["score"]) for r in rows]
    means = [[v for c, v in known if c == name and v is not None] for name in ("bright", "dark")]
    assert [len(values) for values in means] == [15, 12]
    by_hand = sum(sum(values) / len(values) for values in means) / 2
    assert said["measures"]["score"]["mean"]["mean"] == pytest.approx(by_hand)
    assert {r["scores"]["rank"]["score"] for r in rows} == {0.0, 1.0, 2.0}
    text = (whole / "report.md").read_text()
    assert "brightness: 3 of 30 images could not be judged and are in no mean: 3 x the reward could not judge" in text
    assert "| brightness/lit, any of 3 |" in text
    fingerprint = json.loads((whole / "fingerprint.json").read_text())
    assert fingerprint["weights"]["set"] == "base"
    assert fingerprint["recipe"] == {"name": "toy", "hash": RECIPE.hash}


def test_noise_depends_on_seed_text_and_index_alone():
    from rlt2i.evaluation.draw import Draw
    from rlt2i.evaluation.suites.generate import draw_images

    draw = Draw(seed=0, num_steps=3, image_size=8, rollout_batch_size=4, device=torch.device("cpu"))
    policy = load_policy(RECIPE)
    everything = drawings(suite().chosen_prompts(), 3)
    images = draw_images(draw, policy, everything)
    order = [17, 3, 29, 4, 0]
    again = draw_images(attrs.evolve(draw, rollout_batch_size=2), policy, [everything[i] for i in order])
    assert torch.equal(again, images[order])
    renumbered = [attrs.evolve(d, number=d.number + 5, id="x") for d in everything[:3]]
    assert torch.equal(draw_images(draw, policy, renumbered), images[:3])
    assert len({images[i].numpy().tobytes() for i in range(30)}) == 30
    assert not torch.equal(draw_images(attrs.evolve(draw, seed=1), policy, everything[:3]), images[:3])


# ------------------------------------------------------------------------------------------------- shards and kills


def test_independent_shards_give_the_same_images_and_results(whole: Path, tmp_path: Path):
    heard: list[str] = []
    reports = []
    for index in range(3):
        job = {"shard": Shard(index=index, count=3), "say": heard.append}
        reports.append(run(tmp_path / "shards", toy_recipe.clipped(rollout_batch_size=4), **job))
    # `rank` wants whole prompts, so it is asked when all images are there: by whoever comes last, for its share.
    assert reports == [None] * 3
    assert "put it together with: rlt2i eval" in heard[-1]
    report = run(tmp_path / "shards", Folder(path=tmp_path / "shards"), score_only=True)
    assert report is not None
    assert content(tmp_path / "shards") == content(whole)


def test_torchrun_gives_the_same_images_and_results(whole: Path, tmp_path: Path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.helpers.suite_draw"]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "two")],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "two" / "parts").glob("images.*-of-2.jsonl"))) == 2
    assert content(tmp_path / "two") == content(whole)


def test_killed_while_drawing_it_goes_on_byte_for_byte(whole: Path, tmp_path: Path):
    out = tmp_path / "killed"
    assert process(str(out), "", "8", "11").returncode == -signal.SIGKILL  # three images into the second chunk
    assert len(list((out / "images").glob("*.png"))) == 11
    assert process(str(out)).returncode == 0
    assert content(out) == content(whole)


def test_killed_while_scoring_it_goes_on_byte_for_byte(whole: Path, tmp_path: Path):
    out = tmp_path / "killed"
    assert process(str(out), environment={"KILLED_BY_REWARD": "1"}).returncode == -signal.SIGKILL
    assert len(list((out / "images").glob("*.png"))) == 30
    assert process(str(out)).returncode == 0
    assert content(out) == content(whole)


def test_a_line_cut_short_is_made_again(whole: Path, tmp_path: Path):
    run(tmp_path / "cut")
    for kind in ("images", "scores-brightness"):
        part = tmp_path / "cut" / "parts" / f"{kind}.0-of-1.jsonl"
        part.write_bytes(part.read_bytes()[:-25])
    run(tmp_path / "cut")
    assert content(tmp_path / "cut") == content(whole)


# ------------------------------------------------------------------------------------------------------- refusals


def test_another_fingerprint_is_refused_with_what_differs(tmp_path: Path):
    run(tmp_path / "a", prompts=4)
    with pytest.raises(EvaluationError, match=r"(?s)suite\.prompts: 4 there, 10 now.*--out"):
        run(tmp_path / "a")
    with pytest.raises(EvaluationError, match=r"suite\.steps: 3 there, 4 now"):
        run(tmp_path / "a", measured=suite(steps=4), prompts=4)
    with pytest.raises(EvaluationError, match=r"policy\.seed: 0 there, 1 now"):
        run(tmp_path / "a", attrs.evolve(RECIPE, policy=attrs.evolve(RECIPE.policy, seed=1)), prompts=4)
    with pytest.raises(EvaluationError, match=r"the suite has changed since"):
        run(tmp_path / "a", measured=suite(overall="images"), prompts=4)


def test_other_libraries_matter_only_while_images_are_missing(tmp_path: Path):
    run(tmp_path / "a", prompts=4)
    path = tmp_path / "a" / "fingerprint.json"
    old = json.loads(path.read_text())
    old["made_with"]["torch"] = "1.0"
    path.write_text(json.dumps(old))
    assert run(tmp_path / "a", prompts=4) is not None
    part = tmp_path / "a" / "parts" / "images.0-of-1.jsonl"
    part.write_bytes(b"".join(part.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(EvaluationError, match=r"made_with\.torch: '1\.0' there"):
        run(tmp_path / "a", prompts=4)


def test_an_id_that_is_there_twice_is_refused(tmp_path: Path):
    run(tmp_path / "a", prompts=4)
    parts = tmp_path / "a" / "parts"
    (parts / "images.1-of-2.jsonl").write_bytes((parts / "images.0-of-1.jsonl").read_bytes())
    with pytest.raises(EvaluationError, match=r"00000-00 is in images\.0-of-1\.jsonl and in images\.1-of-2\.jsonl"):
        run(tmp_path / "a", prompts=4)


def test_missing_and_foreign_ids_are_refused(tmp_path: Path):
    from rlt2i.evaluation.suites.results import merged

    run(tmp_path / "a", prompts=4)
    folder = Folder(path=tmp_path / "a")
    with pytest.raises(EvaluationError, match=r"images: 3 of 15 are missing, such as 00004-00"):
        merged(folder, 5, 3, [])
    with pytest.raises(EvaluationError, match=r"images: 3 of 9 are not of this suite, such as 00003-00"):
        merged(folder, 3, 3, [])
    with pytest.raises(EvaluationError, match=r"scores of jpeg: 12 of 12 are missing"):
        merged(folder, 4, 3, ["jpeg"])


def test_edited_or_lost_images_are_noticed_when_they_are_judged(tmp_path: Path):
    from PIL import Image

    run(tmp_path / "a", prompts=4)
    path = tmp_path / "a" / "images" / "00002-01.png"
    Image.open(path).save(path, optimize=True)  # another encoding of the same pixels is the same image
    added = {"jpeg": JPEGIncompressibility()}
    run(tmp_path / "a", Folder(path=tmp_path / "a"), score_only=True, added=added)
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(EvaluationError, match=r"00002-01\.png: other pixels than were drawn"):
        run(tmp_path / "a", Folder(path=tmp_path / "a"), score_only=True, rescore=["brightness"])
    path.unlink()
    with pytest.raises(EvaluationError, match=r"00002-01\.png: missing"):
        run(tmp_path / "a", Folder(path=tmp_path / "a"), score_only=True, rescore=["brightness"])


def test_two_processes_on_one_shard_are_refused(tmp_path: Path):
    from rlt2i.evaluation.suites.folder import PartWriter

    run(tmp_path / "a", prompts=4)
    folder = Folder(path=tmp_path / "a")
    with PartWriter(folder, "scores-jpeg", Shard()), pytest.raises(EvaluationError, match="another process is writing"):
        run(tmp_path / "a", folder, score_only=True, added={"jpeg": JPEGIncompressibility()})


def test_a_damaged_record_is_named(tmp_path: Path):
    run(tmp_path / "a", prompts=4)
    part = tmp_path / "a" / "parts" / "images.0-of-1.jsonl"
    part.write_bytes(part.read_bytes().replace(b'{"id"', b'"id"', 1))
    with pytest.raises(EvaluationError, match=r"images\.0-of-1\.jsonl, line 1: no record"):
        run(tmp_path / "a", prompts=4)


# ------------------------------------------------------------------------------------------------------- rewards


def test_a_reward_that_dies_midway_is_invalid_there_and_can_be_asked_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rlt2i.evaluation.suites.score.IMAGES_PER_CHUNK", 6)
    monkeypatch.setenv("REWARD_IS_BROKEN", "1")
    report = run(tmp_path / "a")
    assert report is not None
    said = report.rewards["brightness"]
    assert list(said.reasons.values()) == [6, 3]
    assert next(iter(said.reasons)).startswith("RuntimeError: CUDA error: out of memory")
    assert said.measures["score"].mean.values == 21
    assert "score again with --rescore brightness" in report.text()
    rows = [json.loads(line) for line in (tmp_path / "a" / "results.jsonl").read_text().splitlines()]
    assert rows[15]["scores"]["brightness"] == {"score": None, "reason": next(iter(said.reasons))}
    monkeypatch.delenv("REWARD_IS_BROKEN")
    again = run(tmp_path / "a")
    assert again.rewards["brightness"].invalid == 9  # it is not asked again by itself
    run(tmp_path / "a", Folder(path=tmp_path / "a"), score_only=True, rescore=["brightness"])
    assert content(tmp_path / "a") == content(whole)


def test_a_reward_that_judges_nothing_has_no_mean(tmp_path: Path):
    measured = suite(rewards={"none": toy_recipe.Dying()}, headline="none", images_per_prompt=1)
    object.__setattr__(measured.rewards["none"], "calls", [0, 0, 0])  # it raises from the third call on
    report = run(tmp_path / "a", measured=measured, prompts=4)
    assert report.sentence() == "none: no valid score"
    assert report.rewards["none"].invalid == 4
    assert report.diversity == {}


def test_rewards_are_added_to_saved_images(tmp_path: Path):
    run(tmp_path / "a", prompts=4)
    folder = Folder(path=tmp_path / "a")
    report = run(folder.path, folder, score_only=True, added={"jpeg": JPEGIncompressibility()})
    assert list(report.rewards) == ["brightness", "rank", "jpeg"]
    with pytest.raises(EvaluationError, match=r"scores called 'jpeg' are of a reward with other settings"):
        run(folder.path, folder, score_only=True, added={"jpeg": JPEGIncompressibility(quality=50)})
    other = {"jpeg": JPEGIncompressibility(quality=50)}
    again = run(folder.path, folder, score_only=True, added=other, rescore=["jpeg"])
    before, after = (r.rewards["jpeg"].measures["score"].mean.mean for r in (report, again))
    assert after < before
    with pytest.raises(ValueError, match="the suite has a reward of that name"):
        run(folder.path, folder, score_only=True, added={"rank": JPEGIncompressibility()})
    with pytest.raises(ValueError, match="--rescore taste: no such reward here"):
        run(folder.path, folder, score_only=True, rescore=["taste"])


def test_a_reward_that_needs_other_prompts_is_refused(tmp_path: Path):
    from rlt2i.tasks.shapes.reward import ShapesReward

    with pytest.raises(ValueError, match=r"ShapesReward needs the metadata"):
        run(tmp_path / "a", measured=suite(rewards={"shapes": ShapesReward()}, headline="shapes"))
    assert not (tmp_path / "a").exists()
    run(tmp_path / "a", prompts=4)
    with pytest.raises(ValueError, match=r"shapes: ShapesReward needs the metadata .*'corner 0' carries \['number'\]"):
        run(tmp_path / "a", Folder(path=tmp_path / "a"), score_only=True, added={"shapes": ShapesReward()})


# -------------------------------------------------------------------------------------------------------- pairs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    train(RECIPE, folder)
    return folder


def test_trained_weights_are_paired_with_the_base_beside(trained: Path, whole: Path):
    measured = suite(rewards={"brightness": Brightness()})
    base = evaluate_suite(RECIPE, measured, run_dir=trained, weights="base", say=silent)
    report = evaluate_suite(RECIPE, measured, run_dir=trained, say=silent)
    folders = sorted(path.name for path in (trained / "eval").iterdir())
    assert folders == ["corners-base", "corners-ema-00000004"]
    assert base.against == ""
    assert report.against == str(trained / "eval" / "corners-base")
    rows = [
        [
            json.loads(line)["scores"]["brightness"]["score"]
            for line in (path / "results.jsonl").read_text().splitlines()
        ]
        for path in (trained / "eval" / name for name in folders)
    ]
    # By hand: 5 bright prompts (one could not be judged) and 4 dark ones, 3 images each.
    gains = [None if a is None else b - a for a, b in zip(*rows, strict=True)]
    bright, dark = ([g for g in part if g is not None] for part in (gains[:18], gains[18:]))
    measure = report.rewards["brightness"].measures["score"]
    assert measure.gain.mean == pytest.approx((sum(bright) / 15 + sum(dark) / 12) / 2)
    assert measure.gain.mean == pytest.approx(measure.mean.mean - measure.before)
    assert 0 < measure.gain.low < measure.gain.mean < measure.gain.high  # it learned that corners are bright
    paired, single = (i.high - i.low for i in (measure.gain, measure.mean))
    assert paired < single
    assert report.diversity["vendi"].before == pytest.approx(base.diversity["vendi"].mean.mean)
    assert report.health["saturation"].gain is not None
    images = [(path / "images" / "00004-02.png").read_bytes() for path in (trained / "eval" / folders[0], whole)]
    assert images[0] == images[1]  # the base of this run is the base


def test_pairs_of_unlike_evaluations_are_refused(trained: Path, tmp_path: Path):
    run(tmp_path / "few", prompts=4)
    run(tmp_path / "other", measured=suite(seed=1))
    with pytest.raises(EvaluationError, match="cannot be compared image by image: prompts_sha256 is"):
        run(tmp_path / "whole", against=tmp_path / "few")
    with pytest.raises(EvaluationError, match="seed is 1 there and 0 here"):
        run(tmp_path / "whole", against=tmp_path / "other")
    with pytest.raises(EvaluationError, match="no evaluation"):
        run(tmp_path / "whole", against=tmp_path / "nowhere")
    run(tmp_path / "steps", measured=suite(steps=5))
    report = run(tmp_path / "whole", against=tmp_path / "steps")
    assert report.notes == ["steps 5 there, 3 here"]
    assert "Besides the weights: steps 5 there, 3 here." in report.text()


def test_the_base_beside_must_be_of_the_same_suite(tmp_path: Path):
    run(tmp_path / "corners-base", prompts=4)
    run(tmp_path / "corners-5prompts-base", prompts=5)
    run(tmp_path / "mine", prompts=4)
    # Both are bases; the one with the same prompts counts.
    assert base_beside(Folder(path=tmp_path / "mine")) == tmp_path / "corners-base"
    run(tmp_path / "z", attrs.evolve(RECIPE, policy=attrs.evolve(RECIPE.policy, seed=1)), prompts=4)
    assert base_beside(Folder(path=tmp_path / "z")) is None


def test_scores_of_unlike_rewards_are_not_compared(tmp_path: Path):
    run(tmp_path / "a", prompts=4, added={"jpeg": JPEGIncompressibility()})
    run(tmp_path / "b", prompts=4)
    report = run(tmp_path / "b", prompts=4, added={"jpeg": JPEGIncompressibility()}, against=tmp_path / "a")
    assert report.rewards["jpeg"].measures["score"].gain.mean == 0.0
    other = {"jpeg": JPEGIncompressibility(quality=40)}
    with pytest.raises(EvaluationError, match="a difference would mean nothing"):
        run(tmp_path / "c", prompts=4, added=other, against=tmp_path / "a")
    only = run(tmp_path / "d", prompts=4, against=tmp_path / "a")
    assert only.rewards["brightness"].measures["score"].gain is not None


# --------------------------------------------------------------------------------------------------------- suites


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Corners!"}, "folders start with it"),
        ({"headline": "taste/strict"}, "no reward of the suite is called 'taste'"),
        ({"rewards": {}}, "rewards"),
        ({"rewards": {"a/b": Brightness()}, "headline": "a"}, "reward name 'a/b'"),
        ({"images_per_prompt": 0}, "images_per_prompt"),
        ({"overall": "median"}, "overall"),
    ],
)
def test_a_suite_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        suite(**changes)


def test_prompts_of_a_suite_are_distinct_and_balanced():
    measured = suite()
    assert [p.text for p in measured.chosen_prompts()] == [f"corner {i}" for i in range(10)]
    assert [p.metadata["number"] for p in measured.chosen_prompts(5)] == [0, 6, 1, 7, 2]
    with pytest.raises(ValueError, match="has 10 prompts; use 1 to 10"):
        measured.chosen_prompts(11)
    assert Corners().eval_prompts(11)[10].text == "corner 0"


@pytest.mark.parametrize("text", ["4", "4/4", "a/2", "/2", "1/"])
def test_shards_are_parsed_strictly(text: str):
    with pytest.raises(ValueError, match="shard"):
        Shard.parse(text)


def test_shards_take_everything_once():
    taken = [item for index in range(3) for item in Shard(index=index, count=3).of(range(10))]
    assert sorted(taken) == list(range(10))
    assert Shard.parse("1/3").of(range(10)) == [1, 4, 7]
