"""Training on the workers of a Ray cluster on this machine: the bits of torchrun, a lost worker included."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlt2i.runs.checkpoint import latest_checkpoint
from rlt2i.runs.metrics import read_metrics
from tests.helpers import ray_recipes

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'rlt2i[ray]'")
ROOT = Path(__file__).resolve().parents[2]
RECIPES = ray_recipes.__name__
MEASURED = ("seconds", "time", "memory", "images_per_second")


def run(words: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more
    environment |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def on_ray(recipe: str, folder: Path, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "rlt2i", "train", f"{RECIPES}:{recipe}", "--run-dir", str(folder), *options]
    return run([*words, "--on", "ray", "--workers", "2"], **more)


@pytest.fixture(scope="module")
def by_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun") / "run"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlt2i", "train"]
    ran = run([sys.executable, *launch, f"{RECIPES}:whole", "--run-dir", str(folder)])
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that the newest checkpoint holds."""
    from safetensors.torch import load_file

    newest = latest_checkpoint(folder)
    assert newest is not None
    for file in sorted(newest.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            yield f"{file.relative_to(newest)}:{name}", tensor


def assert_same_run(folder: Path, expected: Path) -> None:
    one, two = dict(tensors(folder)), dict(tensors(expected))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one), [n for n in one if not torch.equal(one[n], two[n])]
    ours, theirs = read_metrics(folder), read_metrics(expected)
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        same = {name for name in other if not any(word in name for word in MEASURED)}
        assert {name: mine[name] for name in same} == {name: other[name] for name in same}


@pytest.mark.slow
def test_two_workers_are_two_processes_of_torchrun_bit_for_bit(tmp_path, by_torchrun):
    ran = on_ray("whole", tmp_path / "run")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert_same_run(tmp_path / "run", by_torchrun)


@pytest.mark.slow
def test_a_lost_worker_costs_nothing_but_time(tmp_path, by_torchrun):
    ran = on_ray("one_lost", tmp_path / "run", **{ray_recipes.MARK: ray_recipes.mark(tmp_path)})
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert Path(ray_recipes.mark(tmp_path)).exists(), "the worker was killed"
    assert "resuming after iteration" in ran.stdout + ran.stderr
    assert_same_run(tmp_path / "run", by_torchrun)


@pytest.mark.slow
def test_rewards_in_actors_of_the_same_cluster_change_no_bit(tmp_path, by_torchrun):
    ran = on_ray("judged_by_actors", tmp_path / "run")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert_same_run(tmp_path / "run", by_torchrun)


@pytest.mark.slow
def test_what_would_fail_again_is_said_and_not_repeated(tmp_path):
    mark = ray_recipes.mark(tmp_path)
    ran = on_ray("gives_up", tmp_path / "run", **{ray_recipes.MARK: mark})
    assert ran.returncode == 2, ran.stderr[-3000:]
    assert "100% of the rewards are invalid" in ran.stderr
    assert "no lamp" in ran.stderr
    assert "Traceback" not in ran.stderr.splitlines()[-1]
    assert len(Path(mark).read_text().split()) == 1, "one iteration of one chunk, once"


def test_a_recipe_that_does_not_work_out_is_refused_before_ray_starts(tmp_path, capsys):
    from rlt2i.cli import main

    words = ["train", f"{RECIPES}:refused", "--run-dir", str(tmp_path / "run"), "--on", "ray", "--workers", "2"]
    assert main(words) == 2
    assert "train.prompts_per_iteration=3 cannot be" in capsys.readouterr().err
    assert not ray.is_initialized()
    assert not (tmp_path / "run").exists()


def test_the_command_line_asks_for_what_it_needs(tmp_path, capsys):
    from rlt2i.cli import main

    words = ["train", f"{RECIPES}:whole", "--run-dir", str(tmp_path / "run"), "--on", "ray"]
    assert main(words) == 2
    assert "Give --workers N" in capsys.readouterr().err
    assert main([*words, "--workers", "2", "--resume", str(tmp_path / "run" / "checkpoints" / "1")]) == 2
    assert "--on ray --resume" in capsys.readouterr().err
