"""`rlt2i serve-reward` as users run it: in a process of its own, behind a training run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file

from rlt2i.cli import main as cli
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from rlt2i.rewards.wire import batch_from_bytes, output_to_bytes
from rlt2i.rewards.wrapper import Wrapper
from rlt2i.runs.metrics import read_metrics
from rlt2i.serve.client import RemoteReward
from rlt2i.serve.protocol import digest
from rlt2i.training.start import train
from rlt2i.training.trainer import RunStopped
from tests.helpers import toy_recipe
from tests.helpers.fake_rewards import Grey
from tests.helpers.servers import Answer, Rogue, free_port, remote

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

ROOT = Path(__file__).parents[2]


def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A reward server in another process, and its URL once it listens."""
    command = [sys.executable, "-m", "rlt2i", "serve-reward", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["url"]


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The URL of a reward server in another process, for as long as the block lasts."""
    process, url = start(*arguments, "--port", "0")
    try:
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_a_run_stops_with_a_message_when_its_server_dies(tmp_path):
    def act(count: int, body: bytes) -> Answer:
        batch, want = batch_from_bytes(body)
        reply, _ = output_to_bytes(Grey().score(batch, want), fingerprint=digest(Grey().fingerprint()))
        return (200, {"content-type": "application/json"}, reply) if count <= 3 else (503, {}, b"")

    with Rogue(Grey(), act) as rogue:
        recipe = attrs.evolve(toy_recipe.clipped(eval_every=4), reward=remote(rogue.url, patience_s=0.3))
        with pytest.raises(RunStopped, match=r"100% of the rewards are invalid.*--resume"):
            train(recipe, tmp_path / "run")
    means = [line["reward/mean"] for line in read_metrics(tmp_path / "run") if "reward/mean" in line]
    assert means
    assert all(mean > 50 for mean in means)


@pytest.mark.slow
def test_the_embedded_model_learns_the_same_from_a_served_reward(tmp_path):
    """`rlt2i train` twice, with the reward in the process and behind a server: equal scores, equal weights."""
    small = ["train.iterations=2", "train.prompts_per_iteration=2", "train.group_size=4", "train.trackers=[]"]
    small += ["train.eval_prompts=6", "train.eval_steps=2", "sampler.num_steps=4", "objective.sigmas.count=1"]
    settings = [word for setting in small for word in ("--set", setting)]

    def run(recipe: str, name: str) -> tuple[list[dict[str, object]], dict[str, torch.Tensor]]:
        assert cli(["train", recipe, *settings, "--run-dir", str(tmp_path / name)]) == 0
        lines = [
            {key: value for key, value in line.items() if key.startswith(("reward", "eval/reward"))}
            for phase in ("train", "eval")
            for line in read_metrics(tmp_path / name, phase)
        ]
        return lines, load_file(next((tmp_path / name / "checkpoint-00000002").glob("online*.safetensors")))

    here, weights = run("jpeg-shapes", "here")
    with served("JPEGCompressibility", "--set", "quality=95") as url:
        text = (ROOT / "rlt2i" / "recipes" / "jpeg-shapes.yaml").read_text()
        reward = f"reward: {{type: RemoteReward, urls: ['{url}'], serves: JPEGCompressibility, chunk: 5}}"
        (tmp_path / "served.yaml").write_text(re.sub(r"^reward: .*$", reward, text, flags=re.MULTILINE))
        there, remote_weights = run(str(tmp_path / "served.yaml"), "there")
    assert there == here
    assert [line["reward/mean"] < -0.1 for line in here[:2]] == [True, True]
    assert len(here) == 4  # two updates, two evaluations
    assert remote_weights.keys() == weights.keys()
    assert all(torch.equal(remote_weights[name], tensor) for name, tensor in weights.items())
    assert json.loads((tmp_path / "there" / "reward.json").read_text())["of"] == JPEGCompressibility().fingerprint()


@attrs.frozen(kw_only=True)
class Interrupted(Wrapper):
    """Another reward whose server is killed just before the second training batch, and started again."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        if batch.ids is not None and str(batch.ids[0]).split("/")[2] == "4":
            process, arguments = SERVER.pop()
            process.kill()
            process.wait(30)
            threading.Timer(0.5, lambda: SERVER.append((start(*arguments)[0], arguments))).start()
        return self.reward.score(batch, want)


SERVER: list[tuple[subprocess.Popen[str], tuple[str, ...]]] = []


@pytest.mark.slow
def test_a_run_outlives_a_restart_of_its_server(tmp_path):
    def run(name: str, reward: Reward) -> list[object]:
        train(attrs.evolve(toy_recipe.clipped(iterations=3, eval_prompts=0), reward=reward), tmp_path / name)
        return [(line["reward/mean"], line["rewards/invalid"]) for line in read_metrics(tmp_path / name)]

    arguments = ("JPEGIncompressibility", "--port", str(free_port()))
    process, url = start(*arguments)
    SERVER.append((process, arguments))
    try:
        client = RemoteReward(urls=(url,), patience_s=120.0)
        there = run("there", Interrupted(reward=client))
        client.close()
        assert SERVER[0][0] is not process
    finally:
        for running, _ in SERVER:
            running.terminate()
            running.wait(30)
        SERVER.clear()
    assert there == run("here", JPEGIncompressibility())
    assert not (tmp_path / "there" / "failures.jsonl").exists()
