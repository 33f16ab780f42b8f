"""Several processes, started in the ways that people start them; one that dies or hangs ends the run on all."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def short() -> Recipe:
    """One iteration without evaluations."""
    return toy_recipe.clipped(iterations=1, eval_every=0, eval_prompts=0)


@attrs.frozen(kw_only=True)
class Leaves(QuadrantBrightness):
    """On the second process, at its fifth batch: stops answering, takes too long, or is gone without a word."""

    how: str = "dies"
    seen: list[int] = attrs.field(factory=list, init=False, eq=False)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        self.seen.append(len(batch.prompts))
        if os.environ.get("RANK") == "1" and len(self.seen) > 4:
            if self.how == "slow":
                time.sleep(30)
            else:
                os.kill(os.getpid(), signal.SIGSTOP if self.how == "hangs" else signal.SIGKILL)
        return super().score(batch, want)


def one_dies() -> Recipe:
    return attrs.evolve(toy_recipe.clipped(iterations=20, eval_every=0, eval_prompts=0), reward=Leaves())


def one_hangs(how: str = "hangs") -> Recipe:
    settings = {"iterations": 20, "eval_every": 0, "eval_prompts": 0, "process_timeout": 10.0}
    return attrs.evolve(toy_recipe.clipped(**settings), reward=Leaves(how=how))


def one_is_slow() -> Recipe:
    return one_hangs("slow")


@pytest.mark.parametrize("launcher", [TORCHRUN, [*ACCELERATE[:4], "--multi_gpu", *ACCELERATE[4:]]])
def test_processes_on_a_machine_without_accelerator_are_one_run(tmp_path, launcher):
    words = [*launcher, "train", f"{__name__}:short", "--run-dir", str(tmp_path / "run")]
    ran = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert len(re.findall(r"processes\W+2\b", ran.stdout)) == 1, ran.stdout  # said by one of them


def commands_of_page() -> dict[str, str]:
    """Run directory -> the commands of docs/scaling.md that train $RECIPE into it on several processes."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^ {4}.*\n)+", page, re.MULTILINE)]
    named = {match[1]: block for block in blocks if (match := re.search(r"--run-dir runs/(\w+)", block))}
    return {name: block for name, block in named.items() if "$RECIPE" in block and "--on ray" not in block}


def test_the_page_shows_every_launcher():
    assert sorted(commands_of_page()) == ["accelerate", "nodes", "slurm", "torchrun"]


@pytest.mark.slow(days=24)
@pytest.mark.parametrize("name", ["accelerate", "nodes", "slurm", "torchrun"])
def test_a_command_of_the_page_trains_as_it_stands(tmp_path, name):
    """But for the folder and the port; all lines of a block at once, since those of several machines are."""
    joined = commands_of_page()[name].replace("\\\n", " ")
    lines = [joined] if "; wait" in joined else [f"{line} &" for line in joined.splitlines()]
    script = "\n".join(["set -m", f"cd {ROOT}", *lines, "for job in $(jobs -p); do wait $job || exit 1; done"])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    where = environment(PATH=path, RECIPE=f"{__name__}:short")
    script = re.sub(r"\b2951\d\b", str(free_port()), script.replace("runs/", f"{tmp_path}/"))
    ran = subprocess.run(["bash", "-c", script], env=where, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert len(re.findall(r"processes\W+2\b", ran.stdout)) == 1, ran.stdout
    saved = latest_checkpoint(tmp_path / name)
    assert saved is not None
    assert load_checkpoint(saved).step == 1


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


@pytest.mark.slow(days=24)
@pytest.mark.parametrize("recipe", ["one_dies", "one_hangs", "one_is_slow"])
def test_one_that_is_lost_ends_the_others_with_a_message(tmp_path, recipe):
    """Two processes as SLURM starts them: nobody but the group itself notices that one is gone."""
    port = free_port()
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
        elif recipe == "one_hangs":
            while (state := Path(f"/proc/{lost.pid}/stat")).read_text().rsplit(")", 1)[1].split()[0] != "T":
                assert healthy.poll() is None
                time.sleep(0.2)
            assert state
        start = time.monotonic()
        _, errors = healthy.communicate(timeout=600)
        if recipe == "one_is_slow":
            late = lost.communicate(timeout=600)[1]
            assert lost.returncode == 2
            assert "process 1 of 2 cannot go on: another process has ended" in late
        else:
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


@pytest.mark.slow(days=24)
def test_a_process_that_fails_or_is_stopped_takes_the_others_along_with_a_message(tmp_path):
    words = [*TORCHRUN[:-1], "tests.helpers.failing_ranks", str(tmp_path)]
    ran = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ends = {(int(rank), name): how for rank, name, how in re.findall(r"<(\d)\|([^|]*)\|([^>]*)>", ran.stdout)}
    for name in ("sampling", "learning", "evaluating, at once", "evaluating, later"):
        assert ends[1, name].startswith("OutOfMemoryError: CUDA out of memory"), ends
        assert ends[0, name].startswith("OtherProcessFailed: "), ends
        assert "another process failed" in ends[0, name]
    for rank in (0, 1):
        assert ends[rank, "not a number"].startswith("UpdateRefused: update 1: loss=nan"), ends
    for name in ("logging", "saving"):
        assert "No space left on device" in ends[0, name], ends
        assert ends[1, name].startswith("OtherProcessFailed: writing the "), ends
    assert ends[0, "stopping"] == ends[1, "stopping"] == "ended"
    assert "stopped after iteration 0" in ran.stdout  # in the middle of the first evaluation
