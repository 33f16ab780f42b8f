"""One writer, a start that may be repeated until something was learned, and a disk that may say no."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch

from rlt2i.runs import files
from rlt2i.runs.checkpoint import CheckpointError, latest_checkpoint, save_checkpoint, verify_checkpoint
from rlt2i.runs.directory import RunDirectory, RunDirectoryError
from rlt2i.runs.files import remove_partials, replace_text
from rlt2i.runs.generators import global_generators, seed_global_generators, undisturbed_generators
from rlt2i.runs.identity import changes, inputs_of
from rlt2i.runs.metrics import parse_metrics
from rlt2i.runs.runlog import RunLog
from rlt2i.tasks.promptfile import PromptFileTask
from tests.helpers import toy_recipe

RECIPE = {"name": "toy", "train": {"seed": 1}}


def _started(path: Path) -> None:
    with RunDirectory.create(path, RECIPE, "old") as run:
        log = RunLog(run, trackers=())
        log.log(0, {"a": 0.0}, phase="eval")
        log.close()
        (path / "images" / "eval-000000.safetensors").write_bytes(b"of an earlier start")
        (path / "failures.jsonl").write_text("{}")
        (path / ".metrics.jsonl.host-1.partial").write_text("half")


def test_a_run_that_never_came_to_a_checkpoint_is_started_over(tmp_path):
    _started(tmp_path)
    with RunDirectory.create(tmp_path, RECIPE | {"name": "other"}, "new") as run:
        assert run.recipe_hash == "new"
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    lines = "metrics.jsonl", "metrics.dropped.jsonl"
    assert left == {"recipe.yaml", "versions.json", "inputs.json", "run.lock", *lines}
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert json.loads((tmp_path / "metrics.dropped.jsonl").read_text())["a"] == 0.0


def test_a_run_with_a_checkpoint_sound_or_not_is_never_started_over(tmp_path):
    _started(tmp_path)
    (tmp_path / "checkpoint-00000003").mkdir()
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        RunDirectory.create(tmp_path, RECIPE, "new")
    assert (tmp_path / "images" / "eval-000000.safetensors").exists()


@pytest.mark.parametrize("how", ["renamed", "deleted", "lock deleted", "another run"])
def test_a_run_whose_directory_is_gone_or_taken_notices(tmp_path, how):
    folder = tmp_path / "run"
    run = RunDirectory.create(folder, RECIPE, "hash")
    run.check()
    other = None
    if how == "renamed":
        folder.rename(tmp_path / "elsewhere")
    elif how == "deleted":
        shutil.rmtree(folder)
    else:
        (folder / "run.lock").unlink()
        other = RunDirectory.create(folder, RECIPE, "hash") if how == "another run" else None
    with pytest.raises(RunDirectoryError, match=r"the run directory (was deleted|has another lock file)"):
        run.check()
    run.close()
    if other is not None:
        other.check()
        other.close()


def test_a_full_disk_while_logging_is_one_clear_message(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunDirectory.create(tmp_path, RECIPE, "hash") as run:
        log = RunLog(run, trackers=())
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl: .*No space left.*free some space"):
                log.log(1, {"a": 1.0})
        log.close()


def test_a_folder_of_another_user_is_one_clear_message(tmp_path, monkeypatch):
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(RunDirectoryError, match=r"Permission denied.*belongs to another user"):
        RunDirectory.create(tmp_path / "run", RECIPE, "hash")


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    import fcntl

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="no locks"), RunDirectory.create(tmp_path, RECIPE, "hash") as run:
        run.check()


def test_a_newest_checkpoint_that_cannot_be_read_is_skipped(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors={}, state={}, export=None, keep=3)
    plain = Path.is_dir

    def locked(self: Path) -> bool:
        if self.name == "checkpoint-00000002":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return plain(self)

    monkeypatch.setattr(Path, "is_dir", locked)
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify_checkpoint(tmp_path / "checkpoint-00000002")
    with pytest.warns(UserWarning, match="Skipping an invalid checkpoint.*Permission denied"):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-00000001"


def test_damaged_lines_are_told_from_sound_ones():
    text = '{"step": 1, "phase": "train", "a": 1}\nrubbish\n{"phase": "train"}\n{"step": 2, "phase": "tr'
    assert [record and record["step"] for _, record in parse_metrics(text)] == [1, None, None, None]
    separator = '{"step": 1, "phase": "train", "note": "a\u2028b"}\n'
    assert len(parse_metrics(separator)) == 1


def test_partial_files_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path):
    living = tmp_path / f".a.{files.socket.gethostname()}-{os.getppid()}.partial"
    dead = tmp_path / f".b.{files.socket.gethostname()}-{2**22 + 1}.partial"
    elsewhere = tmp_path / ".c.otherhost-7.partial"
    for path in (living, dead, elsewhere):
        path.touch()
    assert remove_partials(tmp_path, of_the_dead=True) == [dead]
    os.utime(elsewhere, (0, 0))
    assert remove_partials(tmp_path, of_the_dead=True) == [elsewhere]
    assert remove_partials(tmp_path) == [living]


# --------------------------------------------------------------------------------------------------------- identity


def test_data_files_and_code_belong_to_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na dog\n")
    task = PromptFileTask(train="prompts.txt")
    recipe = attrs.evolve(toy_recipe.clipped(), task=task)
    before = inputs_of(recipe)
    assert before["task.train"]["path"] == str(tmp_path / "prompts.txt")
    (code,) = [name for name in before if name.startswith("reward (")]
    assert "toy" in code
    assert changes(before, inputs_of(recipe)) == []
    Path("prompts.txt").write_text("a cat\na bird\n")
    (line,) = changes(before, inputs_of(recipe))
    assert line.startswith(f"task.train: {tmp_path / 'prompts.txt'} has other content")
    (tmp_path / "moved").mkdir()
    monkeypatch.chdir(tmp_path / "moved")
    Path("prompts.txt").write_text("a cat\na dog\n")  # the same content at another place is no change
    assert changes(before, inputs_of(recipe)) == []


# ------------------------------------------------------------------------------------------------- global generators


def _drawn() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.standard_normal()), random.gauss(0, 1)


def test_global_generators_are_seeded_saved_and_left_alone():
    with undisturbed_generators():
        seed_global_generators("global", 3, 0)
        first = _drawn()
        with undisturbed_generators():
            _drawn()
        second = _drawn()
        seed_global_generators("global", 3, 0)
        assert (_drawn(), _drawn()) == (first, second)
        seed_global_generators("global", 3, 1)
        assert not set(_drawn()) & set(first)
        assert set(global_generators()) >= {"torch", "numpy", "python"}


def test_replacing_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    replace_text(tmp_path / "a", "old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                replace_text(tmp_path / "a", "new")
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert (tmp_path / "a").read_text() == "old"
