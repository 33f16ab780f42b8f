"""Runs survive: exact resume after SIGKILL, graceful stops, refused updates, several processes."""

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
import torch
from safetensors.torch import load_file

from rlt2i.engine import decode
from rlt2i.rewards.combinators import Affine
from rlt2i.runs.checkpoint import CheckpointError, latest_checkpoint
from rlt2i.runs.metrics import read_metrics
from rlt2i.tasks.shapes.reward import ShapesReward
from rlt2i.training.dry_run import describe_run
from rlt2i.training.start import train
from rlt2i.training.trainer import RunStopped
from tests.helpers import toy_recipe
from tests.helpers.toy import ToyPolicy

ROOT = Path(__file__).parents[2]


def weights(run: Path, update: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    folder = run / f"checkpoint-{update:08d}"
    return {
        f"{f.stem}/{k}": v for f in folder.glob("*.safetensors") for k, v in load_file(f).items() if f.stem != "rng"
    }


def assert_equal_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    for name in one:
        assert torch.equal(one[name], other[name]), name


def command(recipe: str, run: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "rlt2i",
        "train",
        f"tests.helpers.toy_recipe:{recipe}",
        "--run-dir",
        str(run),
        *options,
    ]


@pytest.mark.parametrize("recipe", ["clipped", "nft", "tree", "sized"])
def test_resume_continues_bit_for_bit(tmp_path, recipe):
    make = getattr(toy_recipe, recipe)
    train(make(), tmp_path / "whole")
    train(make(), tmp_path / "half")
    train(make(), tmp_path / "half", resume=tmp_path / "half" / "checkpoint-00000002")
    assert_equal_bits(weights(tmp_path / "whole", 4), weights(tmp_path / "half", 4))
    kept = [
        {k: v for k, v in r.items() if "seconds" not in k and k != "time"} for r in read_metrics(tmp_path / "whole")
    ]
    again = [
        {k: v for k, v in r.items() if "seconds" not in k and k != "time"} for r in read_metrics(tmp_path / "half")
    ]
    assert kept == again


def test_run_killed_without_warning_continues_bit_for_bit(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # Both in processes of their own: what else a process has run may change how its kernels split their sums.
    spared = {**environment, "SPARE": "1"}
    subprocess.run(command("killed", tmp_path / "whole"), cwd=ROOT, env=spared, check=True, capture_output=True)
    dead = subprocess.run(
        command("killed", tmp_path / "run"), cwd=ROOT, env=environment, capture_output=True, timeout=300
    )
    assert dead.returncode == -signal.SIGKILL
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-00000002"
    again = subprocess.run(
        command("killed", tmp_path / "run", "--resume"),
        cwd=ROOT,
        env=spared,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0, again.stderr
    assert_equal_bits(weights(tmp_path / "whole", 4), weights(tmp_path / "run", 4))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_stop_finishes_the_update_saves_and_says_how_to_go_on(tmp_path, number):
    process = subprocess.Popen(
        command("slow", tmp_path / "run"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(read_metrics(tmp_path / "run")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    done = read_metrics(tmp_path / "run")[-1]["step"]
    assert 2 <= done < 500
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / f"checkpoint-{done:08d}"
    assert f"rlt2i train --run-dir {tmp_path / 'run'} --resume" in out


def test_nan_reward_is_refused_and_the_last_update_is_there(tmp_path):
    with pytest.raises(RunStopped, match="the score is nan"):
        train(toy_recipe.broken(), tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-00000002"


def test_run_stops_when_too_many_rewards_are_invalid(tmp_path):
    with pytest.raises(RunStopped, match="75% of the rewards are invalid"):
        train(toy_recipe.failing(), tmp_path / "run")
    assert not read_metrics(tmp_path / "run")


def test_resume_refuses_another_recipe(tmp_path):
    train(toy_recipe.clipped(iterations=1), tmp_path / "run")
    with pytest.raises(CheckpointError, match="another recipe"):
        train(toy_recipe.clipped(iterations=2, learning_rate=0.01), tmp_path / "run", resume="latest")
    train(toy_recipe.clipped(iterations=2), tmp_path / "run", resume="latest")  # more updates are a continuation
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [1, 2]


def test_every_update_logs_what_a_user_looks_for(tmp_path):
    train(toy_recipe.clipped(iterations=2), tmp_path / "run")
    first = read_metrics(tmp_path / "run")[0]
    wanted = {
        "reward/mean", "reward/spread", "clip/high", "clip/low", "ratio/abs_minus_one_max", "grad_norm", "kl/base",
        "kl/reference", "map/entropy", "seconds/rollout", "seconds/update", "informative",
    }  # fmt: skip
    assert wanted <= first.keys()
    held_out = read_metrics(tmp_path / "run", "eval")
    assert [r["step"] for r in held_out] == [0, 2]
    assert {"eval/strict", "eval/strict_low", "eval/strict_high", "eval/strict_gain"} <= held_out[1].keys()
    assert (tmp_path / "run" / "images" / "eval-000002.safetensors").exists()
    assert (tmp_path / "run" / "maps" / "step-000001.safetensors").exists()
    json.loads((tmp_path / "run" / "versions.json").read_text())
    assert json.loads((tmp_path / "run" / "reward.json").read_text())["reward"] == "QuadrantBrightness"


def test_a_decoder_in_channels_last_leaves_images_and_maps_that_can_be_saved(tmp_path, monkeypatch):
    plain = ToyPolicy.decode
    monkeypatch.setattr(
        ToyPolicy, "decode", lambda self, latents: plain(self, latents).contiguous(memory_format=torch.channels_last)
    )
    train(toy_recipe.clipped(iterations=1), tmp_path / "run")
    assert load_file(tmp_path / "run" / "maps" / "step-000001.safetensors")["clean"].ndim == 5
    assert decode(ToyPolicy(), torch.randn(4, 3, 8, 8), rollout_batch_size=2).is_contiguous()


def test_held_out_rewards_are_scored_and_change_nothing(tmp_path):
    recipe = toy_recipe.watched(iterations=2, eval_every=1)
    train(recipe, tmp_path / "watched")
    train(toy_recipe.clipped(iterations=2, eval_every=1), tmp_path / "plain")
    assert_equal_bits(weights(tmp_path / "watched", 2), weights(tmp_path / "plain", 2))
    base, halfway, last = read_metrics(tmp_path / "watched", "eval")
    images = load_file(tmp_path / "watched" / "images" / "eval-000000.safetensors")
    sizes = images["heldout/size/scores"]
    assert base["eval/heldout/size"] == pytest.approx(float(sizes.mean()))
    assert base["eval/heldout/size_std"] == pytest.approx(float(sizes.std(correction=0)))
    assert last["eval/heldout/size_gain"] == pytest.approx(
        last["eval/heldout/size"] - base["eval/heldout/size"], abs=1e-6
    )
    assert last["eval/heldout/size_gain_low"] <= last["eval/heldout/size_gain"] <= last["eval/heldout/size_gain_high"]
    assert base["eval/heldout/dying/strict"] == base["eval/heldout/dying"]
    assert (halfway["eval/heldout/dying/invalid"], last["eval/heldout/dying/invalid"]) == (0.0, 1.0)
    assert "eval/heldout/dying" not in last  # it failed, which is not a score of 0
    assert json.loads((tmp_path / "watched" / "heldout.json").read_text())["size"]["reward"] == "JPEGCompressibility"
    assert recipe.heldout["dying"].calls[-1] == -1  # closed


def test_the_alarm_rings_in_a_run_whose_held_out_reward_falls(tmp_path, capsys):
    opposite = Affine(reward=toy_recipe.QuadrantBrightness(), scale=-1.0)
    settings = {"iterations": 3, "eval_every": 0, "ema_decay": None, "learning_rate": 0.1, "eval_prompts": 24}
    train(attrs.evolve(toy_recipe.clipped(**settings), heldout={"opposite": opposite}), tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["alarms"] == 1
    assert "alarm: the trained reward rose while held-out rewards fell: opposite by" in capsys.readouterr().out


def test_what_is_watched_may_change_between_a_run_and_its_continuation(tmp_path):
    train(toy_recipe.clipped(iterations=1), tmp_path / "run")
    train(toy_recipe.watched(iterations=2), tmp_path / "run", resume="latest")
    assert "eval/heldout/size" in read_metrics(tmp_path / "run", "eval")[-1]
    train(toy_recipe.clipped(iterations=3), tmp_path / "run", resume="latest")
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_held_out_reward_without_its_metadata_is_refused_before_anything_runs(tmp_path):
    recipe = attrs.evolve(toy_recipe.clipped(), heldout={"shapes": ShapesReward()})
    with pytest.raises(ValueError, match=r"ShapesReward needs the metadata"):
        train(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match=r"ShapesReward needs the metadata"):
        describe_run(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["clipped", "nft", "tree", "sized"])
def test_two_processes_give_the_update_of_one(tmp_path, recipe):
    """gloo, two ranks, whole groups each: same rollouts, same advantages, same gradient within float addition."""
    train(getattr(toy_recipe, recipe)(), tmp_path / "one")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlt2i"]
    ran = subprocess.run(
        launch + command(recipe, tmp_path / "two")[3:],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, two = weights(tmp_path / "one", 1), weights(tmp_path / "two", 1)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    first, second = read_metrics(tmp_path / "one")[0], read_metrics(tmp_path / "two")[0]
    for name in ("reward/mean", "reward/spread", "grad_norm", "informative"):
        assert second[name] == pytest.approx(first[name], rel=1e-4), name
