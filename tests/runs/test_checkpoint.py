"""A checkpoint is complete or absent, whatever instant the process dies at and whatever the disk says."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlt2i.runs import checkpoint as module
from rlt2i.runs.checkpoint import (
    CheckpointError,
    clean_staging,
    generator_state,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside_after,
    verify_checkpoint,
)


def _export(folder: Path) -> None:
    (folder / "transformer").mkdir()
    save_file({"w": torch.ones(1)}, folder / "transformer" / "weights.safetensors")
    (folder / "README.md").write_text("a model card")


def _tensors(value: float) -> dict[str, dict[str, Tensor]]:
    return {"online": {"w": torch.full((3,), value)}, "ema": {"w": torch.full((3,), value / 2)}}


def _save(run: Path, step: int, *, keep: int = 3, **kwargs) -> Path:
    arguments = {"tensors": _tensors(float(step)), "state": {"step": step}, "export": _export, "keep": keep}
    return save_checkpoint(run, step, **{**arguments, **kwargs})


def _names(run: Path) -> list[str]:
    return sorted(p.name for p in run.iterdir())


# ------------------------------------------------------------------------------------------------- round trip


def test_round_trip_is_exact(tmp_path):
    tensors = {
        "online": {"a": torch.randn(4, 3).T, "b": torch.tensor(float("nan")), "c": torch.ones(2).bfloat16()},
        "rng": {"noise": generator_state(torch.Generator().manual_seed(3))},
        "nothing": {},
    }
    state = {"lr": 0.1 + 0.2, "prompts": {"cursor": 7, "order": (3, 1)}, "best": None, "ok": True}
    path = _save(tmp_path / "new" / "run", 7, tensors=tensors, state=state)
    loaded = load_checkpoint(path)
    assert (path.name, loaded.step) == ("checkpoint-00000007", 7)
    assert loaded.state == {**state, "prompts": {"cursor": 7, "order": [3, 1]}}
    assert {k: set(v) for k, v in loaded.tensors.items()} == {k: set(v) for k, v in tensors.items()}
    for name, group in tensors.items():
        for key, tensor in group.items():
            found = loaded.tensors[name][key]
            assert found.dtype is tensor.dtype
            assert torch.equal(found.nan_to_num(5.0), tensor.nan_to_num(5.0))


def test_manifest_lists_every_file_with_its_size(tmp_path):
    path = _save(tmp_path, 1)
    files = verify_checkpoint(path)["files"]
    assert sorted(files) == [
        "ema.safetensors",
        "export/README.md",
        "export/transformer/weights.safetensors",
        "online.safetensors",
        "state.json",
    ]
    assert files["export/README.md"]["size"] == len("a model card")
    # Nobody else's: a run that a group shares must be readable by the group, as far as the umask says so.
    assert {p.stat().st_mode for p in path.iterdir() if p.is_file()} == {(path / "state.json").stat().st_mode}


def test_oldest_are_pruned_and_latest_is_newest(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (1, 2, 10, 11):
        _save(tmp_path, step, keep=2)
    assert _names(tmp_path) == ["checkpoint-00000010", "checkpoint-00000011"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert load_checkpoint(latest).state == {"step": 11}


def test_same_step_is_replaced(tmp_path):
    _save(tmp_path, 4)
    _save(tmp_path, 4, state={"step": "again"})
    assert _names(tmp_path) == ["checkpoint-00000004"]
    assert load_checkpoint(tmp_path / "checkpoint-00000004").state == {"step": "again"}


def test_later_checkpoints_are_set_aside_not_deleted(tmp_path):
    for step in (1, 2, 3):
        _save(tmp_path, step)
    set_aside_after(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-00000001"
    _save(tmp_path, 2)
    set_aside_after(tmp_path, 1)
    aside = ["superseded-00000002-0", "superseded-00000002-1", "superseded-00000003-0"]
    assert _names(tmp_path) == ["checkpoint-00000001", *aside]
    assert load_checkpoint(tmp_path / aside[2]).step == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"keep": 0}, "keep=0"),
        ({"tensors": {"../online": {}}}, "'../online' is no file name"),
        ({"state": {"a": [1, float("nan")]}}, r"state\.a\[1\]=nan: not JSON"),
        ({"state": {"a": {1: 2}}}, r"state\.a: key 1 would come back as text"),
        ({"state": {"a": torch.ones(1)}}, r"state\.a=tensor"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_writing(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        _save(tmp_path, 1, **kwargs)
    assert _names(tmp_path) == []


# ------------------------------------------------------------------------------------------------------ death

_KILLED = """
    import os, signal, sys, torch
    from pathlib import Path
    from rlt2i.runs.checkpoint import save_checkpoint

    torch.set_num_threads(1)
    step, keep, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    runs = sorted(root.iterdir())

    def export(folder):
        (folder / "weights.json").write_text("{}")

    for number, run in enumerate(runs):
        if os.fork() == 0:
            seen = []
            def on_write(event):
                seen.append(event)
                if len(seen) == number + 1:
                    (run / "died-after").write_text(event)
                    os.kill(os.getpid(), signal.SIGKILL)
            tensors = {"online": {"w": torch.full((3,), float(step))}}
            save_checkpoint(run, step, tensors=tensors, state={"step": step}, export=export, keep=keep,
                            on_write=on_write)
            (run / "died-after").write_text("survived")
            os._exit(0)
        os.wait()
"""


_WRITTEN = ["staged", "online.safetensors", "state.json", "export", "manifest.json"]
_PRUNED = ["hidden checkpoint-00000001", "removed checkpoint-00000001", "survived"]


@pytest.mark.parametrize(
    ("step", "keep", "events"),
    [
        (
            3,
            2,
            [*_WRITTEN, "renamed", *_PRUNED],
        ),
        (
            2,
            1,
            [*_WRITTEN, "set aside", "renamed", "replaced", *_PRUNED],
        ),
    ],
    ids=["new step", "same step again"],
)
def test_killed_after_every_write(tmp_path, step, keep, events):
    """SIGKILL after each change of the disk: the latest checkpoint is whole, and the run goes on."""
    for number in range(len(events)):
        run = tmp_path / f"{number:02d}"
        for earlier in (1, 2):
            _save(run, earlier, state={"step": "earlier"})
    script = [sys.executable, "-c", textwrap.dedent(_KILLED), str(step), str(keep), str(tmp_path)]
    subprocess.run(script, check=True, timeout=120)

    died_after = []
    for run in sorted(tmp_path.iterdir()):
        died_after.append((run / "died-after").read_text())
        published = died_after[-1] not in events[: events.index("renamed")]
        for cleaned in (False, True):
            if cleaned:
                clean_staging(run)
                assert not [name for name in _names(run) if name.startswith(".")]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                latest = latest_checkpoint(run)
            assert latest is not None
            found = load_checkpoint(latest)
            assert (found.step, found.state) == ((step, {"step": step}) if published else (2, {"step": "earlier"}))
        for folder in run.glob("checkpoint-*"):
            verify_checkpoint(folder)  # nothing half written or half removed bears that name
        _save(run, 4, keep=2)
        assert latest_checkpoint(run) == run / "checkpoint-00000004"
    assert died_after == events


def test_staging_of_a_living_process_stays(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    living, own = tmp_path / f".staging-5-{process.pid}", tmp_path / f".staging-5-{os.getpid()}"
    try:
        living.mkdir()
        own.mkdir()
        (tmp_path / ".git").mkdir()
        assert clean_staging(tmp_path) == [own]
        assert living.exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert clean_staging(tmp_path) == [living]
    assert _names(tmp_path) == [".git"]


# -------------------------------------------------------------------------------------------------- disk full


def _full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("write", ["save_tensors", "write_text", "flush", "export", "os.rename", "Path.mkdir"])
def test_disk_full_at_any_write(tmp_path, monkeypatch, write):
    _save(tmp_path, 1, keep=1)
    export: Callable[[Path], None] = _export
    if write == "export":
        export = _full
    elif write == "os.rename":
        monkeypatch.setattr(module.os, "rename", _full)
    elif write == "Path.mkdir":
        monkeypatch.setattr(module.Path, "mkdir", _full)
    else:
        monkeypatch.setattr(module, write, _full)
    with pytest.raises(CheckpointError, match=r"step 2 .*No space left.*GB free\): free some space, lower `keep_"):
        _save(tmp_path, 2, keep=1, export=export)
    monkeypatch.undo()
    assert _names(tmp_path) == ["checkpoint-00000001"]
    assert load_checkpoint(tmp_path / "checkpoint-00000001").state == {"step": 1}
    _save(tmp_path, 2, keep=1)
    assert _names(tmp_path) == ["checkpoint-00000002"]


_LIMITED = """
    import resource, sys, torch
    from pathlib import Path
    from rlt2i.runs.checkpoint import CheckpointError, save_checkpoint

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    run = Path(sys.argv[1])
    for size, text in ((10_000, ""), (1, "x" * 30_000)):
        try:
            save_checkpoint(run, 2, tensors={"online": {"w": torch.zeros(size)}}, state={"text": text},
                            export=None, keep=1)
        except CheckpointError as error:
            print(error)
"""


def test_the_systems_own_refusal(tmp_path):
    """A file-size limit of 20 kB: the tensors fail inside safetensors, then the JSON in Python."""
    _save(tmp_path, 1)
    script = [sys.executable, "-c", textwrap.dedent(_LIMITED), str(tmp_path)]
    lines = subprocess.run(script, check=True, timeout=120, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 2
    assert all("File too large" in line and "Disk or quota full" in line for line in lines)
    assert _names(tmp_path) == ["checkpoint-00000001"]


def test_error_in_the_export_leaves_nothing_behind(tmp_path):
    def export(folder: Path) -> None:
        raise KeyError("no such adapter")

    with pytest.raises(KeyError, match="no such adapter"):
        _save(tmp_path, 1, export=export)
    assert _names(tmp_path) == []


def test_a_replacement_that_cannot_be_renamed_puts_the_old_one_back(tmp_path, monkeypatch):
    _save(tmp_path, 1)
    rename = os.rename
    monkeypatch.setattr(
        module.os, "rename", lambda a, b: _full() if ".staging" in str(a) else rename(a, b), raising=True
    )
    with pytest.raises(CheckpointError, match="No space left"):
        _save(tmp_path, 1, state={"step": "again"})
    assert _names(tmp_path) == ["checkpoint-00000001"]
    assert load_checkpoint(tmp_path / "checkpoint-00000001").state == {"step": 1}
