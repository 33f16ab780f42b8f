"""Shards of several processes make whole tensors, and only if all of them are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlt2i.functional.shards import as_shard, is_sharded, local, rows_of, shard_like
from rlt2i.runs.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from rlt2i.runs.shard_files import ShardedTensors, ShardError, shard_groups

WHOLE = {"w": torch.arange(10.0).reshape(5, 2), "b": torch.arange(1.0), "step": torch.tensor(7.0)}


def write(folder: Path, group: str, parts: int) -> None:
    """As `parts` processes would: ceil(n / parts) rows each, the last ones fewer or none; numbers from the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        tensors, places = {}, {}
        for name, whole in WHOLE.items():
            if whole.ndim == 0 and part:
                continue
            step = -(-len(whole) // parts) if whole.ndim else 0
            start = min(part * step, len(whole)) if whole.ndim else 0
            tensors[name] = whole[start : start + step].clone() if whole.ndim else whole
            places[name] = {"shape": list(whole.shape), "start": start}
        file = folder / f"{group}.shard-{part:05d}-of-{parts:05d}.safetensors"
        save_file(tensors, file, metadata={"rows": json.dumps(places)})


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_shards_of_any_number_of_processes_make_the_whole(tmp_path, parts):
    write(tmp_path, "online", parts)
    read = ShardedTensors(sorted(tmp_path.iterdir()))
    assert set(read) == set(WHOLE)
    assert all(torch.equal(read[name], whole) for name, whole in WHOLE.items())


def test_missing_rows_and_foreign_files_are_refused(tmp_path):
    write(tmp_path, "online", 3)
    files = sorted(tmp_path.iterdir())
    assert shard_groups([*(file.name for file in files), "rng.safetensors"]) == {"online": [f.name for f in files]}
    with pytest.raises(ShardError, match="online: 2 of 3 shards are there"):
        shard_groups([file.name for file in files[:2]])
    for kept in (files[:2], files[::2], files[1:]):
        with pytest.raises(ShardError, match=r"w: its shards are rows of \[\d, 2\], the whole is \[5, 2\]"):
            ShardedTensors(kept)["w"]
    with pytest.raises(ShardError, match="w: its shards"):
        ShardedTensors([files[0], files[0], files[2]])["w"]  # the right number of rows, one part twice
    save_file({"w": torch.ones(1)}, files[0])
    with pytest.raises(ShardError, match="no shard of rlt2i"):
        ShardedTensors(files)


def test_a_checkpoint_of_shards_is_sealed_like_any_other(tmp_path):
    run, shards = tmp_path / "run", tmp_path / "run" / ".shards-1-1"
    write(shards, "online", 2)
    path = save_checkpoint(run, 1, tensors={"rng": {}}, state={}, export=None, keep=1, shards=shards)
    assert not shards.exists()
    found = load_checkpoint(path).tensors
    assert set(found) == {"online", "rng"}
    assert all(torch.equal(found["online"][name], whole) for name, whole in WHOLE.items())
    other = tmp_path / "other"
    shutil.copytree(path, other)
    (other / "online.shard-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard-00001-of-00002.safetensors: missing"):
        load_checkpoint(other)


def test_rows_are_cut_as_fsdp_cuts_them():
    plain = torch.arange(3.0)
    assert not is_sharded(plain)
    assert local(plain) is plain is shard_like(plain, plain) is as_shard(plain, plain)

    class Mesh:
        def size(self, dim: int) -> int:
            return (2, 4)[dim]

        def get_local_rank(self, dim: int) -> int:
            return (1, 3)[dim]

    class Placement:
        def __init__(self, shard: bool) -> None:
            self.shard = shard

        def is_shard(self, dim: int) -> bool:
            return self.shard

        def is_replicate(self) -> bool:
            return not self.shard

    class Cut:
        device_mesh, placements, shape = Mesh(), (Placement(False), Placement(True)), torch.Size([9, 2])

    rows = rows_of(Cut())  # 4 parts of ceil(9 / 4) = 3 rows: 3, 3, 3 and none
    assert (rows.start, rows.stop, rows.part, rows.parts, rows.replica, rows.replicas) == (9, 9, 3, 4, 1, 2)
