"""Evaluation and map files of a writer that is killed: the old one or the new one, never a part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from rlt2i.runs.artifacts import (
    evaluation_file,
    maps_file,
    open_images,
    open_maps,
    read_evaluation,
    write_evaluation,
    write_maps,
)
from rlt2i.runs.files import remove_partials

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def save(kind: str, run_dir: Path, value: int) -> None:
    """A file of two images of one value."""
    images = torch.full((2, 3, 4, 4), value, dtype=torch.uint8)
    prompts, scores = [f"prompt {value}"] * 2, [float(value)] * 2
    if kind == "evaluation":
        tensors = {"images": images, "scores": torch.tensor(scores), "valid": torch.ones(2, dtype=torch.bool)}
        write_evaluation(evaluation_file(run_dir, 0), tensors, prompts=prompts, categories=["one"] * 2, headline=scores)
    else:
        write_maps(
            maps_file(run_dir, 0), weights=torch.full((2, 3, 2, 2), float(value)), clean=images[:, None], final=images,
            sigmas=torch.linspace(1, 0, 4), prompts=prompts, core=[["prompt"]] * 2, scores=scores,
        )  # fmt: skip


def saved(kind: str, run_dir: Path) -> int:
    """The one value of a file that is whole."""
    if kind == "evaluation":
        file = evaluation_file(run_dir, 0)
        evaluation, opened = read_evaluation(file), open_images(file, 0)
        values = {*evaluation.tensors["images"].flatten().tolist(), *evaluation.tensors["scores"].tolist()}
        values |= {*opened.scores, *opened.image(1).flatten().tolist()}
        texts = {*evaluation.prompts, *opened.prompts}
    else:
        samples = open_maps(maps_file(run_dir, 0))
        values = {v for s in samples for v in (s.score, *s.weights.flatten().tolist(), *s.final.flatten().tolist())}
        texts = {sample.prompt for sample in samples}
    (value,) = values
    assert texts == {f"prompt {value:.0f}"}
    return int(value)


WRITER = """
import os, signal, sys
from pathlib import Path
from tests.runs.test_artifacts import save
CHANGES = {"open", "os.chmod", "os.rename", "os.remove", "os.mkdir"}
for kind in ("evaluation", "maps"):
    number, alive = 0, False
    while not alive:
        run = Path(sys.argv[1]) / kind / f"{number:03d}"
        save(kind, run, 1)
        if os.fork() == 0:
            left = number
            def before(event, arguments):
                global left
                if event in CHANGES and str(run) in str(arguments[0]):
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left -= 1
            sys.addaudithook(before)
            save(kind, run, 2)
            os._exit(0)
        alive = os.wait()[1] == 0
        number += 1
"""


def test_a_writer_killed_before_any_change_of_the_disk_leaves_a_whole_file(tmp_path: Path):
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=120)
    for kind in ("evaluation", "maps"):
        runs = sorted((tmp_path / kind).iterdir())
        found = [saved(kind, run) for run in runs]
        assert len(runs) > 4  # the partial file, its mode, its rename and the flushes
        assert found == sorted(found)
        assert (found[0], found[-1]) == (1, 2)
        leftovers = [partial for run in runs for partial in remove_partials(run)]
        assert leftovers  # of those killed before the rename, and of them alone
        assert {run for run, value in zip(runs, found, strict=True) if value == 1} >= {p.parents[1] for p in leftovers}
        for run in runs:
            save(kind, run, 3)
            assert saved(kind, run) == 3
            assert len([path for path in run.rglob("*") if path.is_file()]) == 1
