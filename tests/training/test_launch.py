"""Several processes, started in the ways that people start them; one that dies or hangs ends the run on all."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest

from rlt2i.distributed import Distributed, LaunchError
from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.recipes import Recipe
from rlt2i.runs.checkpoint import latest_checkpoint, load_checkpoint
from tests.helpers import toy_recipe
from tests.helpers.toy import QuadrantBrightness

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlt2i"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "-m", "rlt2i"]


def environment(**more: str) -> dict[str, str]:
    """Of a machine without an accelerator, where nobody says that the CPU is to be used."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return bare | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def short() -> Recipe:
    """One iteration without evaluations."""
    return toy_recipe.clipped(iterations=1, eval_every=0, eval_prompts=0)


@attrs.frozen(kw_only=True)
class Leaves(QuadrantBrightness):
    """On the second process: stops answering (`hangs`), or is gone without a word, at its third batch."""

    hangs: bool = False
    seen: list[int] = attrs.field(factory=list, init=False, eq=False)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        self.seen.append(len(batch.prompts))
        if os.environ.get("RANK") == "1" and len(self.seen) > 4:
            os.kill(os.getpid(), signal.SIGSTOP if self.hangs else signal.SIGKILL)
        return super().score(batch, want)


def one_dies() -> Recipe:
    return attrs.evolve(toy_recipe.clipped(iterations=20, eval_every=0, eval_prompts=0), reward=Leaves())


def one_hangs() -> Recipe:
    settings = {"iterations": 20, "eval_every": 0, "eval_prompts": 0, "process_timeout": 4.0}
    return attrs.evolve(toy_recipe.clipped(**settings), reward=Leaves(hangs=True))


@pytest.mark.parametrize("launcher", [TORCHRUN, [*ACCELERATE[:4], "--multi_gpu", *ACCELERATE[4:]]])
def test_processes_on_a_machine_without_accelerator_are_one_run(tmp_path, launcher):
    words = [*launcher, "train", f"{__name__}:short", "--run-dir", str(tmp_path / "run")]
    ran = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert len(re.findall(r"processes\W+2\b", ran.stdout)) == 1, ran.stdout  # said by one of them


def test_processes_that_did_not_find_each_other_are_refused(monkeypatch):
    Distributed()  # a group of its own
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="2 processes were launched, but this one is in a group of 1"):
        Distributed()


def test_accelerate_on_the_cpu_starts_one_of_two_and_is_refused(tmp_path):
    words = [
        *ACCELERATE[:4],
        "--cpu",
        *ACCELERATE[4:],
        "train",
        f"{__name__}:short",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    ran = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode != 0
    assert "accelerate launch was asked for several processes and started one" in ran.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["one_dies", "one_hangs"])
def test_one_that_is_lost_ends_the_others_with_a_message(tmp_path, recipe):
    """Two processes as SLURM starts them: nobody but the group itself notices that one is gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = tmp_path / "run"
    words = [sys.executable, "-m", "rlt2i", "train", f"{__name__}:{recipe}", "--run-dir", str(run)]
    processes = []
    for rank in range(2):
        who = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment(**who, **where),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    healthy, lost = processes
    try:
        if recipe == "one_dies":
            lost.wait(timeout=600)
        else:
            while (state := Path(f"/proc/{lost.pid}/stat")).read_text().rsplit(")", 1)[1].split()[0] != "T":
                assert healthy.poll() is None
                time.sleep(0.2)
            assert state
        start = time.monotonic()
        _, errors = healthy.communicate(timeout=600)
        assert time.monotonic() - start < 60
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert healthy.returncode == 2
    assert "process 0 of 2 cannot go on: another process has ended, or did not answer for" in errors
    assert "start again with --resume" in errors
    assert "Traceback" not in errors
    saved = latest_checkpoint(run)
    assert saved is not None, "what was finished before is saved"
    assert load_checkpoint(saved).step >= 3


@pytest.mark.slow
def test_a_process_that_fails_or_is_stopped_takes_the_others_along_with_a_message(tmp_path):
    words = [*TORCHRUN[:-1], "tests.helpers.failing_ranks", str(tmp_path)]
    ran = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ends = {(int(rank), name): how for rank, name, how in re.findall(r"<(\d)\|([^|]*)\|([^>]*)>", ran.stdout)}
    for name in ("sampling", "learning", "evaluating, at once", "evaluating, later"):
        assert ends[1, name].startswith("OutOfMemoryError: CUDA out of memory"), ends
        assert ends[0, name].startswith("OtherProcessFailed: "), ends
        assert "another process failed" in ends[0, name]
    for name in ("logging", "saving"):
        assert "No space left on device" in ends[0, name], ends
        assert ends[1, name].startswith("OtherProcessFailed: writing the "), ends
    assert ends[0, "stopping"] == ends[1, "stopping"] == "ended"
    assert "stopped after iteration 0" in ran.stdout  # in the middle of the first evaluation
