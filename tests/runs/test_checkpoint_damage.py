"""Damaged and malicious checkpoints: refused by name, skipped, never unpickled."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlt2i.runs.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from rlt2i.runs.files import looks_like_pickle, sha256


def _save(run: Path, step: int, **kwargs) -> Path:
    arguments = {
        "tensors": {"online": {"w": torch.ones(3)}},
        "state": {"step": step},
        "export": None,
        "keep": 3,
    }
    return save_checkpoint(run, step, **{**arguments, **kwargs})


def _damage(path: Path, kind: str) -> None:
    file = path / "online.safetensors"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif kind == "one bit":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif kind == "missing":
        file.unlink()
    elif kind == "no manifest":
        (path / "manifest.json").unlink()
    elif kind == "torn manifest":
        (path / "manifest.json").write_text((path / "manifest.json").read_text()[:40])
    elif kind == "newer schema":
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    elif kind == "outside":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["../../secret"] = {"size": 1, "sha256": ""}
        (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"online.safetensors: \d+ bytes, expected \d+; truncated"),
        ("one bit", r"online.safetensors: not the SHA-256 of the manifest"),
        ("missing", r"online.safetensors: missing"),
        ("no manifest", r"manifest.json: missing or not JSON"),
        ("torn manifest", r"manifest.json: missing or not JSON"),
        ("newer schema", r"manifest.json: schema version 99, expected 1. Read it with the version"),
        ("outside", r"manifest.json: entry '../../secret' is malformed. Do not trust"),
    ],
)
def test_damage_is_named_and_skipped_with_one_warning(tmp_path, kind, message):
    good, bad = _save(tmp_path, 1), _save(tmp_path, 2)
    _damage(bad, kind)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(bad)
    with pytest.warns(UserWarning, match="Skipping an invalid checkpoint.*checkpoint-00000002"):
        assert latest_checkpoint(tmp_path) == good
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(tmp_path) == good


def _forge(path: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint and make the manifest agree with it, as an attacker would."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    digest = sha256(path / name)
    manifest["files"][name] = {"size": len(content), "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))


# A protocol-4 and a protocol-0 pickle of os.system("echo"); a torch.save archive is a zip file.
_PROTOCOL_4 = b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x04echo\x85R."
_PROTOCOL_0 = b"cposix\nsystem\n(S'echo'\ntR."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("optimizer.pt", b"", "optimizer.pt: a pickle or torch.save archive"),
        ("weights.bin", b"", "weights.bin: a pickle"),
        ("online.safetensors", _PROTOCOL_4, "online.safetensors: a pickle"),
        ("online.safetensors", b"PK\x03\x04....", "online.safetensors: a pickle"),
        ("online.safetensors", _PROTOCOL_0, "online.safetensors: not a safetensors file"),
        ("state.json", _PROTOCOL_4, "state.json: a pickle"),
        ("state.json", _PROTOCOL_0, "state.json: missing or not JSON"),
        ("state.json", b"[1]", "state.json: holds a list, expected an object"),
    ],
)
def test_pickles_are_refused_even_with_a_matching_manifest(tmp_path, name, content, message):
    path = _save(tmp_path, 1)
    _forge(path, name, content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_an_export_that_pickles_is_refused_when_writing(tmp_path):
    def export(folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(_PROTOCOL_4)

    with pytest.raises(CheckpointError, match=r"export/pytorch_model.bin: a pickle.*safe_serialization=True"):
        _save(tmp_path, 1, export=export)
    assert list(tmp_path.iterdir()) == []


def test_a_header_as_long_as_a_pickle_mark_is_no_pickle(tmp_path):
    # A header of 640 = 0x0280 bytes starts the file with 80 02, as a protocol-2 pickle does.
    for padding in range(500, 640):
        file = tmp_path / "x.safetensors"
        save_file({"w": torch.zeros(1)}, file, metadata={"note": "x" * padding})
        if file.read_bytes()[:2] == b"\x80\x02":
            break
    assert file.read_bytes()[:2] == b"\x80\x02"
    assert not looks_like_pickle(file)
    assert load_file(file)["w"].tolist() == [0.0]
