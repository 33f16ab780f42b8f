"""`rlt2i serve-reward` as users run it: in a process of its own, behind a training run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import torch
from safetensors.torch import load_file

from rlt2i.interfaces import Reward
from rlt2i.rewards.jpeg import JPEGIncompressibility
from rlt2i.rewards.wire import batch_from_bytes, output_to_bytes
from rlt2i.run import train
from rlt2i.runlog import read_metrics
from rlt2i.serve.client import RemoteReward
from rlt2i.serve.protocol import digest
from rlt2i.trainer import RunStopped
from tests import toy_recipe
from tests.rewards.fakes import Grey
from tests.serve.servers import Answer, Rogue, remote

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

ROOT = Path(__file__).parents[2]


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The URL of a reward server in another process."""
    command = [sys.executable, "-m", "rlt2i", "serve-reward", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait(30)


def test_a_run_stops_with_a_message_when_its_server_dies(tmp_path):
    def act(count: int, body: bytes) -> Answer:
        batch, want = batch_from_bytes(body)
        reply, _ = output_to_bytes(Grey().score(batch, want), fingerprint=digest(Grey().fingerprint()))
        return (200, {"content-type": "application/json"}, reply) if count <= 2 else (503, {}, b"")

    with Rogue(Grey(), act) as rogue:
        recipe = attrs.evolve(toy_recipe.clipped(eval_every=4), reward=remote(rogue.url, patience_s=0.3))
        with pytest.raises(RunStopped, match=r"100% of the rewards are invalid.*--resume"):
            train(recipe, tmp_path / "run")
    means = [line["reward/mean"] for line in read_metrics(tmp_path / "run") if "reward/mean" in line]
    assert means
    assert all(mean > 50 for mean in means)


@pytest.mark.slow
def test_training_learns_the_same_from_a_served_reward(tmp_path):
    """Two updates of the toy policy: the same rewards, and the same weights bit for bit."""

    def run(name: str, reward: Reward) -> tuple[list[dict[str, object]], dict[str, torch.Tensor]]:
        recipe = attrs.evolve(toy_recipe.clipped(updates=2), reward=reward)
        train(recipe, tmp_path / name)
        lines = [
            {key: value for key, value in line.items() if key.startswith(("reward", "eval/reward"))}
            for line in read_metrics(tmp_path / name)
        ]
        return lines, load_file(next((tmp_path / name / "checkpoint-00000002").glob("online*.safetensors")))

    metrics, weights = run("here", JPEGIncompressibility())
    with served("JPEGIncompressibility") as url:
        remote = RemoteReward(urls=(url,), serves="JPEGIncompressibility", chunk=5)
        remote_metrics, remote_weights = run("there", remote)
        remote.close()
    assert remote_metrics == metrics
    assert any(line.get("reward/mean") for line in metrics)
    assert remote_weights.keys() == weights.keys()
    assert all(torch.equal(remote_weights[name], tensor) for name, tensor in weights.items())
