"""A disk that is full, read-only or somebody else's, at any write of any command: one message, and nothing is lost."""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rlt2i.bench import runner, trial
from rlt2i.bench.folder import BenchFolder
from rlt2i.cli import main
from rlt2i.config import dump_yaml, to_mapping
from rlt2i.evaluation.suites.catalogue import suite_mapping
from rlt2i.runs.checkpoint import latest_checkpoint
from tests.bench.test_bench import toy_plan
from tests.helpers.filesystem_events import changes, in_a_fork, refused
from tests.helpers.suite_parts import suite
from tests.runs.test_kills import content, recipe

SHARE = 40
"""Every fortieth change by default; all of them under the slow mark."""
PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "results" / "bench" / "cells-clipped"
"""Small tables of a benchmark, which can be read and published again."""
WAYS_OUT = ("free some space", "--run-dir", "another folder", "on a healthy, writable disk", "--out")


SMALL = ("iterations=1", "prompts_per_iteration=1", "group_size=2", "optimizer_steps_per_iteration=1", "eval_prompts=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, a suite, and a finished run that must stay as it is."""
    place = tmp_path_factory.mktemp("disk")
    (place / "toy.yaml").write_text(dump_yaml(recipe().mapping()))
    (place / "corners.yaml").write_text(dump_yaml(suite_mapping(suite(prompts=2, images_per_prompt=3, steps=1))))
    for seed in (0, 1):
        where = ["--run-dir", str(place / "done" / str(seed))]
        run(["train", str(place / "toy.yaml"), "--set", f"train.seed={seed}", *where])
    return place


def run(words: Sequence[str]) -> None:
    assert main(words) == 0, words


COMMANDS = {
    "train": ["train", "TOY", "--run-dir", "OUT", "--resume", "auto", "--report"],
    "suite": ["eval", "TOY", "--suite", "SUITE", "--out", "OUT"],
    "pairs": ["pairs", "TOY", "OUT", "--images", "2", "--prompts", "3", "--steps", "1"],
    "sample": ["sample", "DONE/0", "--prompt", "a corner", "--count", "2", "--out", "OUT/a.png", "--separate"],
    "maps": ["maps", "DONE/0", "--prompt", "a bright corner", "--out", "OUT/a.png"],
    "eval": ["eval", "DONE/0", "--prompts", "2", "--out", "OUT/a.json"],
    "report": ["report", "DONE/0", "--out", "OUT/a.html"],
    "compare": ["compare", "uniform=DONE/0", "star=DONE/1", "--out", "OUT"],
    "look": ["look", "DONE/0", "--prompt", "a bright corner", "--steps", "2", "--out", "OUT/a.html"],
    "publish": ["bench", "PUBLISHED/plan.yaml", "--out", "PUBLISHED", "--publish", "OUT/a", "--bands", "OUT/b"],
    "plan": ["plan", "star-cells", "--fit", "2GB", "--out", "OUT/a.yaml"],
    "export": ["export", "EMBEDDED", "--to", "merged", "--out", "OUT/a"],
    "probe": ["bench", "probe", "TOY", "--batches", "1", "--interventions", "1", "--prompts", "1", "--group-size", "4",
              "--out", "OUT/a.csv", "--keep", "OUT/kept"],
    "lab": ["bench", "lab", "--out", "OUT", "--batches", "3", "--seeds", "1"],
}  # fmt: skip
SLOW = {"probe", "lab", "look", "plan", "export"}
"""They compute for seconds, at every change."""
BY_NAME = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in COMMANDS]


def filled(words: Sequence[str], place: Path, out: Path) -> list[str]:
    names = {
        "TOY": place / "toy.yaml",
        "SUITE": place / "corners.yaml",
        "DONE": place / "done",
        "EMBEDDED": place / "embedded",
        "PUBLISHED": PUBLISHED,
        "OUT": out,
    }
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    return list(words)


def check(name: str, place: Path, tmp_path: Path, cases: Callable[[int], Iterable[tuple[int, int]]]) -> None:
    """For some (change, error): the command says why and how to go on; given again, it ends as if nothing had been.

    Args:
        cases: of the number of changes that the command makes.
    """
    out, note = tmp_path / "out", tmp_path / "note"
    if name == "export" and not (place / "embedded").exists():
        settings = [word for setting in SMALL for word in ("--set", f"train.{setting}")]
        run(["train", "uniform-cells", *settings, "--run-dir", str(place / "embedded")])
    words = filled(COMMANDS[name], place, out)
    run(filled(COMMANDS[name], place, place / "warm" / name))  # children must not import it all again
    listed = changes(lambda: run(words), out, note)
    expected, before = content(out), content(place / "done")
    shutil.rmtree(out)
    for number, code in cases(len(listed)):
        status, said = refused(words, out, number, code, note)
        told = f"{errno.errorcode[code]} at change {number} of {len(listed)}: {listed[number]}\n{said}"
        assert "Traceback" not in said, told
        assert status in (0, 2), told
        if status == 2:
            assert str(out) in said, told
            assert any(way in said for way in WAYS_OUT), told
            assert len(said.splitlines()) <= 6, told
        else:  # an old checkpoint that stays, or nothing was to be written any more
            assert said or found_equal(content(out), expected), told
        if name == "train" and (checkpoint := latest_checkpoint(out)) is not None:
            assert checkpoint.name in ("checkpoint-00000001", "checkpoint-00000002"), told
        if status or name != "export":  # an export that is whole is not written over
            assert in_a_fork(partial(run, words)) == 0, told
        assert found_equal(content(out), expected), told
        shutil.rmtree(out)
    assert content(place / "done") == before


def found_equal(found: dict[str, object], expected: dict[str, object]) -> bool:
    """The same files; pages and records that hold times or paths differ in content."""
    timed = (".html", ".svg", "report.json", "report.md")
    return found.keys() == expected.keys() and all(
        found[key] == value for key, value in expected.items() if not key.endswith(timed)
    )


@pytest.mark.parametrize("name", BY_NAME)
def test_a_disk_that_refuses_is_one_message_and_nothing_is_lost(name, place, tmp_path):
    """At the first change, of another kind for every command; and full at some others, every day at others."""
    code = (errno.EACCES, errno.EROFS, errno.EDQUOT)[list(COMMANDS).index(name) % 3]
    today = datetime.date.today().toordinal() % SHARE
    check(
        name,
        place,
        tmp_path,
        lambda count: [(0, code), *((n, errno.ENOSPC) for n in range(today % max(1, count - 1), count, SHARE))],
    )


@pytest.mark.slow(days=24)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full_at_every_change(name, place, tmp_path):
    check(name, place, tmp_path, lambda count: [(n, errno.ENOSPC) for n in range(count)])


# -------------------------------------------------------------------------------------------- trials side by side


@pytest.fixture
def begun(tmp_path: Path) -> tuple[list[str], Path]:
    """The command of a small benchmark whose common start is judged, and its folder."""
    plan = toy_plan(seeds=1)
    (tmp_path / "toy.yaml").write_text(dump_yaml(to_mapping(plan, typed=False)))
    folder = BenchFolder(path=tmp_path / "out")
    folder.base.parent.mkdir(parents=True)
    folder.base.write_bytes(b"")
    return ["bench", str(tmp_path / "toy.yaml"), "--out", str(folder.path), "--jobs", "2"], folder.path


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_fills_while_trials_run_ends_the_benchmark_with_one_message(begun, code, monkeypatch, capsys):
    words, folder = begun

    def refused(*_: object) -> int:
        raise OSError(code, os.strerror(code), str(folder))

    monkeypatch.setattr(runner, "_wait", refused)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert os.strerror(code) in said
    assert any(way in said for way in WAYS_OUT)
    assert len(said.splitlines()) == 1


def test_a_file_system_without_locks_is_no_other_process(begun, monkeypatch, capsys):
    words, _ = begun

    def no_locks(code: int) -> Callable[[int, int], None]:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(code, os.strerror(code))

        return flock

    monkeypatch.setattr(runner, "_wait", lambda *_: 1)
    for code in (errno.ENOLCK, errno.EOPNOTSUPP):
        monkeypatch.setattr(fcntl, "flock", no_locks(code))
        with pytest.warns(UserWarning, match="has no locks"):
            assert main(words) == 1  # it went on, and the trials failed
    monkeypatch.setattr(fcntl, "flock", no_locks(errno.EIO))
    assert main(words) == 2
    assert "another process" not in capsys.readouterr().err
    monkeypatch.setattr(fcntl, "flock", no_locks(errno.EWOULDBLOCK))
    assert main(words) == 2
    assert "another process is running this benchmark" in capsys.readouterr().err


def test_a_trial_says_why_it_cannot_write(begun, monkeypatch, capsys):
    def refused(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.csv")

    _, folder = begun
    BenchFolder(path=folder).prepare(plan := toy_plan(seeds=1), plan.recipes())
    monkeypatch.setattr(trial, "_end_with_parent", lambda: None)
    monkeypatch.setattr(trial, "run_trial", refused)
    assert trial.main([str(folder), "copy", "0"]) == 1
    said = capsys.readouterr().err
    assert "No space left on device: 'x.csv'. Disk or quota full" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_what_safetensors_says_of_the_disk_is_understood_wherever_it_is_said(code, monkeypatch, capsys):
    def refused(*_: object, **__: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: whatever (os error {code})")

    monkeypatch.setattr("rlt2i.cli.inspecting.loaded", refused)
    assert main(["export", "star-cells", "--to", "peft"]) == 2
    assert os.strerror(code) in capsys.readouterr().err
