"""Checkpoints that are complete or absent: safetensors and JSON, staged, verified, renamed.

    <run>/checkpoint-00000120/
        online.safetensors, ema.safetensors, optimizer.safetensors, ...    what `tensors` names
        online.shard-00000-of-00002.safetensors, ...                       the same of a sharded network: `shards`
        state.json                                                         counters, hyper-parameters, cursors
        export/...                                                         what the ecosystem loads
        manifest.json                                                      size and SHA-256 of each file; last

A folder is staged under a hidden name, flushed to disk and renamed only when it is complete; older ones are
removed only after that. Whatever instant the machine dies at, the previous checkpoint is whole. Nothing here
reads or writes a pickle, and what looks like one is refused: accelerate's `save_state` writes several, and
neither stages nor verifies.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import attrs
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlt2i.runs.files import (
    advice,
    flush,
    looks_like_pickle,
    plain_json,
    process_is_alive,
    save_tensors,
    sha256,
    write_text,
)
from rlt2i.runs.optimizer_state import generator_state as generator_state
from rlt2i.runs.optimizer_state import optimizer_tensors as optimizer_tensors
from rlt2i.runs.optimizer_state import restore_generator as restore_generator
from rlt2i.runs.optimizer_state import restore_optimizer as restore_optimizer
from rlt2i.runs.shard_files import ShardedTensors, ShardError, shard_groups

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
EXPORT = "export"

_FINAL = re.compile(r"checkpoint-(\d{8,})")
_HIDDEN = re.compile(r"\.(staging|replaced|removed|shards)-(\d+)-(\d+)")
_WAY_OUT = "Resume from an earlier checkpoint-<step> folder ('latest' skips this one)."
_reported: set[Path] = set()


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or cannot be trusted; names file, reason and way out."""


@attrs.frozen(kw_only=True, eq=False)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        path: its folder.
        step: iterations finished when it was written.
        tensors: file name without suffix -> name -> CPU tensor; put together when asked for, where it is in shards.
        state: the JSON state.
    """

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    export: Callable[[Path], None] | None,
    keep: int,
    shards: Path | None = None,
    on_write: Callable[[str], None] = lambda event: None,
) -> Path:
    """Write `checkpoint-<step>` atomically, then remove the oldest complete ones beyond `keep`.

    A checkpoint of the same step is replaced. One process at a time may write (see `directory.RunDirectory`).

    Args:
        run_dir: the run's folder; created if needed.
        step: iterations finished, >= 0.
        tensors: file name without suffix -> name -> tensor on any device.
        state: JSON with finite numbers.
        export: writes files that the ecosystem loads into the folder it is given.
        keep: checkpoints to keep, the new one included, >= 1.
        shards: a folder that processes have filled (`shard_folder`, `shard_files.write_shards`); its files move here.
        on_write: called with what has just been done, after every change of the disk (for tests).

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError: on arguments that cannot be saved, before anything is written.
        CheckpointError: when the disk refuses (full, read-only); earlier checkpoints stay as they are.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"save_checkpoint(step={step}, keep={keep}): use step >= 0 and keep >= 1.")
    for name in tensors:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"save_checkpoint: {name!r} is no file name. Use letters, digits, '_' and '-'.")
    text = json.dumps(plain_json(state, "state"), indent=1)
    staging = run_dir / f".staging-{step}-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        on_write("staged")
        for name, group in tensors.items():
            save_tensors(staging / f"{name}.safetensors", group)
            on_write(f"{name}.safetensors")
        if shards is not None:
            for path in sorted(shards.iterdir()):
                os.rename(path, staging / path.name)
            shards.rmdir()
            on_write("shards")
        write_text(staging / STATE, text)
        on_write(STATE)
        if export is not None:
            (staging / EXPORT).mkdir()
            export(staging / EXPORT)
            on_write(EXPORT)
        _seal(staging, step)
        on_write(MANIFEST)
        final = _publish(staging, run_dir / f"checkpoint-{step:08d}", on_write)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise _refusal(error, run_dir, step) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    prune(run_dir, step, keep, on_write)
    return final


def shard_folder(run_dir: Path, step: int, pid: int) -> Path:
    """Where the processes of a run put their shards before the first of them makes a checkpoint of it.

    Args:
        pid: of the first process; `clean_staging` removes what it leaves when it dies.
    """
    return run_dir / f".shards-{step}-{pid}"


def _seal(folder: Path, step: int) -> None:
    """Flush every file and folder, then write the manifest that declares them complete."""
    mode = (folder / STATE).stat().st_mode
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            if looks_like_pickle(path):
                raise CheckpointError(
                    f"{name}: a pickle, which no checkpoint may hold. Export with safe_serialization=True."
                )
            path.chmod(mode)  # safetensors writes files that only their owner may read
            files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        flush(path)
    manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": files}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    flush(folder)


def _publish(staging: Path, final: Path, on_write: Callable[[str], None]) -> Path:
    """Give the staged folder its name. A predecessor of the same step stays readable until that is done."""
    aside = final.with_name(staging.name.replace("staging", "replaced"))
    replaces = final.exists()
    if replaces:
        os.rename(final, aside)
        on_write("set aside")
    try:
        os.rename(staging, final)
    except OSError:
        if replaces:
            os.rename(aside, final)
        raise
    flush(final.parent)
    on_write("renamed")
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)
        on_write("replaced")
    return final


def prune(run_dir: Path, step: int, keep: int, on_write: Callable[[str], None] = lambda event: None) -> None:
    """Remove complete checkpoints older than `step`, oldest first, so that `keep` remain, that of `step` included."""
    older = sorted((s, p) for s, final, p in _folders(run_dir) if final and s < step)
    complete = [(s, p) for s, p in older if (p / MANIFEST).is_file()]
    for old, path in complete[: max(0, len(complete) - (keep - 1))]:
        # Renamed first, so that a folder half removed is never taken for a checkpoint.
        removed = run_dir / f".removed-{old}-{os.getpid()}"
        try:
            os.rename(path, removed)
            on_write(f"hidden {path.name}")
            shutil.rmtree(removed)
            on_write(f"removed {path.name}")
        except OSError as error:
            warnings.warn(f"{path}: an old checkpoint stays ({error}). Remove it by hand.", stacklevel=3)


def clean_staging(run_dir: Path) -> list[Path]:
    """Remove what dead writers left behind, and put back a checkpoint whose replacement was cut short.

    Call it at start, holding the lock of the run directory.

    Returns:
        The folders removed.
    """
    removed = []
    for path in sorted(run_dir.glob(".*")):
        match = _HIDDEN.fullmatch(path.name)
        if match is None or _alive(int(match[3])):
            continue
        final = run_dir / f"checkpoint-{int(match[2]):08d}"
        if match[1] == "replaced" and not final.exists():
            os.rename(path, final)
            continue
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    return removed


def set_aside_after(run_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints later than `step`, so that "latest" never means a branch that was abandoned.

    For a run that is resumed from an earlier checkpoint than its latest.

    Returns:
        Their new names, `superseded-<step>-<number>`; nothing is deleted.
    """
    moved = []
    for later, final, path in sorted(_folders(run_dir)):
        if final and later > step:
            number = 0
            while (target := run_dir / f"superseded-{later:08d}-{number}").exists():
                number += 1
            os.rename(path, target)
            moved.append(target)
    return moved


def tensor_names(files: Iterable[str]) -> list[str]:
    """What a checkpoint with these files holds tensors of: "online", "ema", "optimizer", ..., in shards or not."""
    return sorted({name.partition(".")[0] for name in files if "/" not in name and name.endswith(".safetensors")})


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint against its manifest and read it onto the CPU.

    Raises:
        CheckpointError: if a file is missing, truncated, altered, or a pickle.
    """
    manifest = verify_checkpoint(path)
    tensors: dict[str, Mapping[str, Tensor]] = {}
    names = [name for name in sorted(manifest["files"]) if "/" not in name and name.endswith(".safetensors")]
    try:
        groups = shard_groups(names)
        tensors |= {group: ShardedTensors([path / name for name in files]) for group, files in groups.items()}
    except ShardError as error:
        raise CheckpointError(f"{path}: {error}. {_WAY_OUT}") from error
    for name in set(names).difference(*groups.values()):
        try:
            tensors[name.removesuffix(".safetensors")] = load_file(path / name)
        except SafetensorError as error:
            raise CheckpointError(f"{path / name}: not a safetensors file ({error}). {_WAY_OUT}") from error
    return Checkpoint(path=path, step=manifest["step"], tensors=tensors, state=_read_json(path / STATE))


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest.

    Returns:
        The manifest: "schema_version", "step" and "files" (name -> "size" in bytes, "sha256").

    Raises:
        CheckpointError: naming the first file that is missing, truncated, altered, or a pickle.
    """
    try:
        return _verified(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). {_WAY_OUT}") from error


def _verified(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder. Pass a checkpoint-<step> folder, or 'latest'.")
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        if looks_like_pickle(file):
            raise CheckpointError(
                f"{file}: a pickle or torch.save archive, which can run code when it is read. Checkpoints "
                "hold safetensors and JSON only: remove the file, or choose a checkpoint that you trust."
            )
    manifest = _read_json(path / MANIFEST)
    if (version := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path / MANIFEST}: schema version {version!r}, expected {SCHEMA_VERSION}. Read it with the "
            "version of rlt2i that wrote it."
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE not in files or not isinstance(manifest.get("step"), int):
        raise CheckpointError(f"{path / MANIFEST}: lists no step or no {STATE}. {_WAY_OUT}")
    for name, entry in files.items():
        _verify_file(path, name, entry)
    return manifest


def _verify_file(folder: Path, name: str, entry: Any) -> None:
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\\" in name or not isinstance(entry, dict):
        raise CheckpointError(f"{folder / MANIFEST}: entry {name!r} is malformed. Do not trust this folder.")
    file = folder / name
    if not file.is_file():
        raise CheckpointError(f"{file}: missing. {_WAY_OUT}")
    size, expected = file.stat().st_size, entry.get("size")
    if size != expected:
        raise CheckpointError(f"{file}: {size} bytes, expected {expected}; truncated or altered. {_WAY_OUT}")
    if sha256(file) != entry.get("sha256"):
        raise CheckpointError(f"{file}: not the SHA-256 of the manifest; altered or damaged. {_WAY_OUT}")


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that verifies, or None. Invalid ones are skipped, with one warning each."""
    for _, _, path in sorted(_folders(run_dir), reverse=True):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            if path.resolve() not in _reported:
                _reported.add(path.resolve())
                warnings.warn(f"Skipping an invalid checkpoint. {error}", stacklevel=2)
        else:
            return path
    return None


def has_checkpoint(run_dir: Path) -> bool:
    """Whether there is any checkpoint, sound or not: a run with one is never started over."""
    return next(_folders(run_dir), None) is not None


def _folders(run_dir: Path) -> Iterator[tuple[int, bool, Path]]:
    """(step, whether under its final name, path) of every checkpoint, those about to be replaced included."""
    for path in run_dir.glob("*-*"):
        if match := _FINAL.fullmatch(path.name):
            yield int(match[1]), True, path
        elif (match := _HIDDEN.fullmatch(path.name)) and match[1] == "replaced":
            yield int(match[2]), False, path


def _alive(pid: int) -> bool:
    return pid != os.getpid() and process_is_alive(pid)  # an earlier life: containers often start with the same number


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or not JSON ({error}). {_WAY_OUT}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected an object. {_WAY_OUT}")
    return content


def _refusal(error: OSError, run_dir: Path, step: int) -> CheckpointError:
    return CheckpointError(
        f"{run_dir}: could not write the checkpoint of step {step} ({error}). Earlier checkpoints are "
        f"untouched. {advice(error, run_dir)}"
    )
