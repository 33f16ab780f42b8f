"""Killed before any change of the disk whatever, a command that is given again ends as if nothing had happened."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlt2i.evaluation.pairs import make_pairs
from rlt2i.evaluation.suites.evaluate import evaluate_suite
from rlt2i.runs.checkpoint import has_checkpoint
from rlt2i.training.start import train
from tests.helpers import toy_recipe
from tests.helpers.filesystem_events import changes, in_a_fork, killed
from tests.helpers.suite_parts import suite

SHARE = 16
"""Every sixteenth change by default, others every day; all of them under the slow mark."""


def recipe():
    """Two iterations with everything that writes: evaluations, maps, an average, checkpoints that are replaced."""
    return toy_recipe.clipped(
        iterations=2,
        prompts_per_iteration=2,
        group_size=2,
        optimizer_steps_per_iteration=1,
        eval_prompts=2,
        eval_every=1,
        eval_steps=2,
        keep_checkpoints=1,
    )


def run(folder: Path) -> None:
    """What a scheduler does: the same command again, whatever happened."""
    train(recipe(), folder, resume="auto")


def run_by_hand(folder: Path) -> None:
    """What a person does: --resume only where there is something to resume."""
    train(recipe(), folder, resume="latest" if has_checkpoint(folder) else None)


def evaluation(folder: Path) -> None:
    small = suite(prompts=2, images_per_prompt=3, steps=1)
    evaluate_suite(toy_recipe.clipped(), small, out=folder, say=lambda _: None)


def pairs(folder: Path) -> None:
    small = toy_recipe.clipped(rollout_batch_size=4)
    policy = small.policy.load()
    make_pairs(small, policy, folder, prompts=3, images=2, num_steps=1, say=lambda _: None)


COMMANDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "run": (run, run_by_hand),
    "suite": (evaluation, evaluation),
    "pairs": (pairs, pairs),
}


def content(folder: Path) -> dict[str, object]:
    """Every file below a folder; without times, process numbers, and what a start adds to the record of starts."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in ("run.lock", "metrics.dropped.jsonl"):
            continue
        if name == "versions.json":
            found[name] = json.loads(path.read_text())["recipe"]
        elif name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in r.items() if k != "time" and "seconds" not in k} for r in lines]
        elif path.suffix == ".safetensors":
            tensors = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in load_file(path).items()}
            found[name] = {k: v.numpy().tobytes() for k, v in tensors.items()}
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory):
    """Of each command: what it leaves undisturbed, and the changes that it makes on the way."""
    made: dict[str, tuple[dict[str, object], list[str]]] = {}

    def whole(name: str):
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            COMMANDS[name][0](place / "warm" / "out")  # children must not import it all again
            listed = changes(lambda: COMMANDS[name][0](place / "out"), place / "out", place / "changes")
            made[name] = (content(place / "out"), listed)
        return made[name]

    return whole


def check_kills(name: str, wholes, folder: Path, numbers: range, *, twice: bool = False) -> None:
    expected, listed = wholes(name)
    start, again = (partial(command, folder) for command in COMMANDS[name])
    for number in numbers:
        told = f"killed before change {number} of {len(listed)}: {listed[number]}"
        assert killed(start, folder, number), told
        recover = again if number % 2 else start
        if twice:
            killed(recover, folder, number // 2)
        assert in_a_fork(recover) == 0, told
        found = content(folder)
        assert found.keys() == expected.keys(), told
        assert not [key for key in expected if found[key] != expected[key]], told
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_before_a_change_of_the_disk_ends_as_if_nothing_had_happened(name, wholes, tmp_path):
    today = datetime.date.today().toordinal() % SHARE
    check_kills(name, wholes, tmp_path / "out", range(today, len(wholes(name)[1]), SHARE))


@pytest.mark.slow(days=24)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "and again while it recovers"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_before_every_change_of_the_disk(name, twice, wholes, tmp_path):
    check_kills(name, wholes, tmp_path / "out", range(len(wholes(name)[1])), twice=twice)
