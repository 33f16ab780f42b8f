"""One run, one writer; what it logged is there, once, whatever happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from rlt2i.runs.directory import RunDirectory, RunDirectoryError
from rlt2i.runs.metrics import read_metrics
from rlt2i.runs.runlog import RunLog

RECIPE = {
    "name": "toy",
    "credit": {"mix": 0.7, "steps": [0, 1]},
    "reward": {"api_key": "sk-123", "max_tokens": 77},
}


def _create(path: Path) -> RunDirectory:
    return RunDirectory.create(path, RECIPE, "abc123")


def _lines(run: RunDirectory, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run.path / name).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- directory


def test_a_new_run_writes_down_what_it_is(tmp_path):
    with _create(tmp_path / "deep" / "run") as run:
        recipe = yaml.safe_load((run.path / "recipe.yaml").read_text())
        versions = json.loads((run.path / "versions.json").read_text())
    assert recipe == {**RECIPE, "reward": {"api_key": "<redacted>", "max_tokens": 77}}
    assert versions["recipe"] == run.recipe_hash == "abc123"
    assert versions["torch"].startswith(torch.__version__.split("+")[0])
    expected = {
        "python",
        "diffusers",
        "transformers",
        "accelerate",
        "peft",
        "rlt2i",
        "git",
        "platform",
        "command",
    }
    assert expected <= versions.keys()
    assert (run.path / "images").is_dir()


def test_reopening_adds_a_start_and_a_second_run_is_refused(tmp_path):
    _create(tmp_path).close()
    (tmp_path / "checkpoint-00000001").mkdir()
    with pytest.raises(RunDirectoryError, match=r"already holds a run\. Continue it with --resume"):
        _create(tmp_path)
    for _ in range(2):
        with RunDirectory.open(tmp_path) as run:
            assert run.recipe_hash == "abc123"
    assert len(json.loads((tmp_path / "versions.json").read_text())["resumed"]) == 2
    with pytest.raises(RunDirectoryError, match=r"no recipe\.yaml, so no run to continue"):
        RunDirectory.open(tmp_path / "elsewhere")
    (tmp_path / "versions.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"versions.json: missing or damaged"):
        RunDirectory.open(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"versions.json: missing or damaged"):
        RunDirectory.open(tmp_path)  # and not "in use": a refusal lets go of the lock


_HOLDER = """
    import os, sys, time
    from pathlib import Path
    from rlt2i.runs.directory import RunDirectory

    run = RunDirectory.open(Path(sys.argv[1]))
    child = os.fork()  # a worker, say, that outlives its parent
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    _create(tmp_path).close()
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_HOLDER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(RunDirectoryError, match=rf"in use by process {holder.pid} on .*stop it with `kill`"):
            RunDirectory.open(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # the child lives on, without the lock
        with RunDirectory.open(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / "run.lock").read_text()
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


# --------------------------------------------------------------------------------------------------- metrics


def test_a_line_per_step_and_phase(tmp_path):
    with _create(tmp_path) as run:
        log = RunLog(run, trackers=())
        log.log(0, {"eval/strict": 0.5}, phase="eval")
        log.log(1, {"reward/mean": torch.tensor(0.25), "count": 3, "kl": float("nan"), "x": -float("inf")})
        assert _lines(run)[1]["reward/mean"] == 0.25  # on disk before the log is closed
        log.close()
    first, second = _lines(run)
    assert {k: v for k, v in first.items() if k != "time"} == {"step": 0, "phase": "eval", "eval/strict": 0.5}
    del second["time"]
    nonfinite = {"kl": None, "x": None, "nonfinite": ["kl", "x"]}
    assert second == {"step": 1, "phase": "train", "reward/mean": 0.25, "count": 3, **nonfinite}
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    assert [r["step"] for r in read_metrics(tmp_path, "eval")] == [0]


def test_log_refusals(tmp_path):
    with _create(tmp_path) as run:
        log = RunLog(run, trackers=())
        log.log(3, {"a": 1.0})
        log.log(3, {"a": 1.0}, phase="eval")
        with pytest.raises(ValueError, match=r"log\(step=3, phase='train'\): step 3 is logged already"):
            log.log(3, {"a": 1.0})
        with pytest.raises(ValueError, match=r"'a' is shape \[2\], not a number"):
            log.log(4, {"a": torch.ones(2)})
        with pytest.raises(ValueError, match=r"'a' is 'text', not a number"):
            log.log(4, {"a": "text"})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match=r"the names \['step'\] are taken"):
            log.log(4, {"step": 1.0})
        with pytest.raises(ValueError, match="tracker 'mlflow': unknown"):
            RunLog(run, trackers=("mlflow",))
        log.close()
    assert len(_lines(run)) == 2


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    with _create(tmp_path) as run:
        log = RunLog(run, trackers=())
        log.log(0, {"a": 0.0}, phase="eval")
        for step in range(1, 6):
            log.log(step, {"a": float(step)})
        log.close()
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 6, "phase": "tr')  # killed while writing
    with RunDirectory.open(tmp_path) as run:
        with pytest.raises(ValueError, match=r"a line is damaged: .* Call run.rewind\(step\) first"):
            RunLog(run, trackers=())
        assert len(run.rewind(3)) == 3
        assert run.rewind(3) == []
        log = RunLog(run, trackers=())
        log.log(4, {"a": 40.0})
        log.close()
    assert [(r["step"], r["a"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    dropped = (tmp_path / "metrics.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["a"] for line in dropped[:2]] == [4.0, 5.0]
    assert dropped[2] == '{"step": 6, "phase": "tr'
    with RunDirectory.open(tmp_path) as run:
        assert len(run.rewind(-1)) == 5
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_complete_last_line_without_its_newline_is_kept(tmp_path):
    with _create(tmp_path) as run:
        log = RunLog(run, trackers=())
        log.log(1, {"a": 1.0})
        log.close()
        path = tmp_path / "metrics.jsonl"
        path.write_text(path.read_text().rstrip("\n"))
        assert run.rewind(1) == []
        log = RunLog(run, trackers=())
        log.log(2, {"a": 2.0})
        log.close()
        assert [r["a"] for r in read_metrics(tmp_path)] == [1.0, 2.0]


# -------------------------------------------------------------------------------------------------- trackers


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_tensorboard_shows_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from PIL import Image

    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "grid.png")
    with _create(tmp_path / "run") as run:
        log = RunLog(run)
        for step in (1, 2, 3):
            log.log(step, {"a": float(step), "bad": float("nan")})
        kept = log.images(3, "held out/grid", tmp_path / "grid.png")
        log.close()
    assert kept == run.path / "images" / "held-out-grid-000003.png"
    assert kept.is_file()
    with RunDirectory.open(run.path) as run:
        run.rewind(1)
        log = RunLog(run)
        log.log(2, {"a": 20.0})
        log.close()
    assert _scalars(run.path / "tensorboard", "a") == [(1, 1.0), (2, 20.0)]


def test_missing_trackers(tmp_path, monkeypatch):
    from accelerate import utils

    monkeypatch.setattr(utils, "is_tensorboard_available", lambda: False)
    monkeypatch.setattr(utils, "is_wandb_available", lambda: False)
    with _create(tmp_path) as run:
        RunLog(run, trackers=("tensorboard",)).close()
        assert not (tmp_path / "tensorboard").exists()
        with pytest.raises(ValueError, match=r"tracker 'wandb': not installed\. `pip install wandb`"):
            RunLog(run, trackers=("wandb",))


class _Tracker:
    name = "wandb"

    def __init__(self, project: str, **options: object) -> None:
        self.said: list = [("init", project, options)]

    def start(self) -> None:
        self.said.append("start")

    def store_init_configuration(self, values: dict) -> None:
        self.said.append(("config", values["hash"], values["reward"]["api_key"]))

    def log(self, values: dict, step: int) -> None:
        if step == 2:
            raise ConnectionError("no route to host")
        self.said.append((step, values))

    def finish(self) -> None:
        self.said.append("finish")


def test_a_tracker_gets_the_redacted_recipe_and_its_failure_costs_nothing(tmp_path, monkeypatch):
    from accelerate import tracking, utils

    made: list[_Tracker] = []
    monkeypatch.setattr(utils, "is_wandb_available", lambda: True)
    monkeypatch.setattr(
        tracking, "WandBTracker", lambda *args, **kwargs: made.append(_Tracker(*args, **kwargs)) or made[-1]
    )
    with _create(tmp_path / "run") as run:
        log = RunLog(run, trackers=("wandb",), options={"wandb": {"entity": "us", "name": "mine"}})
        log.log(1, {"a": 1.0, "b": float("inf")})
        with pytest.warns(UserWarning, match="wandb failed and is switched off: no route to host"):
            log.log(2, {"a": 2.0})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log.log(3, {"a": 3.0})
        log.close()
    options = {"name": "mine", "dir": str(run.path), "entity": "us"}
    config = ("config", "abc123", "<redacted>")
    assert made[0].said == [("init", "rlt2i", options), "start", config, (1, {"a": 1.0})]
    assert [r["a"] for r in read_metrics(run.path)] == [1.0, 2.0, 3.0]


def test_importing_stays_cheap():
    modules = "runs.checkpoint, rlt2i.runs.logbook, rlt2i.runs.artifacts, rlt2i.runs.trackers, rlt2i.training.signals"
    heavy = "'accelerate', 'tensorboard', 'torch.utils.tensorboard', 'diffusers', 'transformers', 'PIL'"
    source = f"import sys, rlt2i.{modules}; print(sorted({{{heavy}}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, text=True).stdout == "[]\n"
