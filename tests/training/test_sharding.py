"""Full fine-tuning spread over processes: the gradients, bits, files and errors of one process."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlt2i.evaluation.inspection import load_policy
from rlt2i.functional.ema import power_decay
from rlt2i.recipes import load_recipe
from rlt2i.runs.checkpoint import load_checkpoint
from rlt2i.training.preflight import check_before_weights
from rlt2i.training.sharding import check_sharding
from tests.helpers import sharded_recipes, toy_recipe

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return bare | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def launch(folder: Path, *names: str, processes: int) -> dict[tuple[int, str], str]:
    """(rank, run) -> how it ended."""
    words = [sys.executable, "-m"]
    if processes > 1:
        words += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    words += ["tests.helpers.sharded_recipes", str(folder), *names]
    ran = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-5000:]
    return {(int(rank), name): how for rank, name, how in re.findall(r"<(\d)\|([^|]*)\|([^>]*)>", ran.stdout)}


def first_of_two(folder: Path, name: str) -> str:
    """What the first of two processes says that nobody watches over, as SLURM starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tests.helpers.sharded_recipes", str(folder), name]
    processes = []
    for rank in range(2):
        who = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        where = environment(**who, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        processes.append(subprocess.Popen(words, cwd=ROOT, env=where, stderr=subprocess.PIPE, text=True))
    try:
        return processes[0].communicate(timeout=600)[1]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    launch(folder, "plain", processes=1)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(folder, "plain", "replayed", processes=2)
    return folder


def check_gradients(found: Path, expected: Path) -> int:
    """Both are sums over the same n (rollout, step) pairs: each is off by at most (n - 1) roundings of their sizes.

    In the norm of a weight; in float32 a rounding is 2^-24.
    """
    gradients, reference = (load_file(folder / "0.safetensors") for folder in (found, expected))
    sizes = load_file(expected / "0.sizes.safetensors")
    passes = int((expected / "0.passes-0").read_text())
    pairs = passes * int(sharded_recipes.SETTINGS["train.micro_batch_size"])
    assert gradients.keys() == reference.keys() == sizes.keys()
    for name, gradient in gradients.items():
        bound = 2 * (pairs - 1) * 2.0**-24 * sizes[name].norm()
        assert (gradient.double() - reference[name].double()).norm() <= bound, name
    return passes


@pytest.mark.slow(days=31)
def test_gradients_are_those_of_one_process_up_to_the_order_of_summation(one: Path, two: Path):
    passes = check_gradients(two / "plain.gradients", one / "plain.gradients")
    shares = [int((two / "plain.gradients" / f"0.passes-{rank}").read_text()) for rank in (0, 1)]
    assert passes == 4
    assert shares == [1, 3], "the first process takes part in passes for the second alone"


@pytest.mark.slow(days=31)
def test_files_are_shards_and_the_export_is_a_stock_pipeline(two: Path):
    from diffusers import StableDiffusion3Pipeline

    folder = two / "plain" / "checkpoint-00000001"
    names = {path.name for path in folder.glob("*.safetensors")}
    kinds = ("ema", "online", "optimizer")
    assert names == {"rng.safetensors"} | {f"{k}.shard-0000{i}-of-00002.safetensors" for k in kinds for i in (0, 1)}
    sizes = [(folder / f"online.shard-0000{i}-of-00002.safetensors").stat().st_size for i in (0, 1)]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]
    averaged = load_checkpoint(folder).tensors["ema"]
    pipe = StableDiffusion3Pipeline.from_pretrained(folder / "export", text_encoder_3=None, tokenizer_3=None)
    exported = pipe.transformer.state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in averaged.items())
    # What every command reads: here one process, without shards.
    policy = load_policy(sharded_recipes.small(), run_dir=two / "plain", weights="online", device="cpu")
    online = load_checkpoint(folder).tensors["online"]
    parameters = policy.trainable_parameters()
    assert parameters.keys() == set(online)
    assert all(torch.equal(parameter, online[name]) for name, parameter in parameters.items())
    base = sharded_recipes.small().policy.load().trainable_parameters()
    assert any(not torch.equal(tensor, base[name]) for name, tensor in online.items())
    decay = power_decay(1, decay=0.5, warmup=10)
    for name, tensor in averaged.items():
        torch.testing.assert_close(
            tensor, decay * base[name].detach() + (1 - decay) * online[name], rtol=1e-6, atol=1e-8
        )


def same_bits(found: Path, expected: Path) -> bool:
    one, other = load_checkpoint(found), load_checkpoint(expected)
    assert one.tensors.keys() == other.tensors.keys()
    return all(
        torch.equal(tensor, one.tensors[kind][name])
        for kind in ("online", "ema", "optimizer")
        for name, tensor in other.tensors[kind].items()
    )


def same_update(found: Path, expected: Path, before: Path) -> bool:
    """The last iteration moved the weights alike, but for what AdamW makes of the roundings of small gradients."""
    ends = [load_checkpoint(path).tensors["online"] for path in (found, expected, before)]
    whole = [torch.cat([ends[i][name].flatten() for name in sorted(ends[0])]) for i in range(3)]
    return float((whole[0] - whole[1]).norm()) < 0.02 * float((whole[1] - whole[2]).norm())


@pytest.mark.slow(days=31)
def test_a_process_that_dies_ends_the_run_which_goes_on_to_the_same_bits(two: Path, tmp_path: Path):
    errors = first_of_two(tmp_path, "dies")
    assert "process 0 of 2 cannot go on" in errors, errors[-3000:]
    assert "start again with --resume" in errors
    assert not (tmp_path / "dies" / "checkpoint-00000003").exists()
    shutil.move(tmp_path / "dies", tmp_path / "on")
    launch(tmp_path, "on", processes=2)
    end = "checkpoint-00000003"
    assert same_bits(tmp_path / "on" / end, two / "replayed" / end)


@pytest.mark.slow(days=31)
@pytest.mark.parametrize("name", ["silent", "silent-inside"])
def test_a_process_that_hangs_ends_the_run_in_time(tmp_path: Path, name: str):
    errors = first_of_two(tmp_path, name)
    assert "process 0 of 2 cannot go on" in errors, errors[-3000:]
    assert "did not answer for 45 seconds" in errors
    assert "start again with --resume" in errors
    assert load_checkpoint(tmp_path / name / "checkpoint-00000001").step == 1


@pytest.mark.slow(days=31)
def test_gradients_recomputed_compiled_and_in_bfloat16(two: Path, tmp_path: Path):
    """The first two are other ways to the same bits; bfloat16 moves the gradient as it does on one process, by 1/40."""
    launch(tmp_path, "checkpointing", "compiled", "bfloat16", processes=2)
    plain = load_file(two / "plain.gradients" / "0.safetensors")
    for name in ("checkpointing", "compiled"):
        found = load_file(tmp_path / f"{name}.gradients" / "0.safetensors")
        assert all(torch.equal(found[weight], gradient) for weight, gradient in plain.items()), name
    rounded = load_file(tmp_path / "bfloat16.gradients" / "0.safetensors")
    names = sorted(plain)
    one, other = (torch.cat([gradients[name].flatten().double() for name in names]) for gradients in (plain, rounded))
    assert 1e-3 < (other - one).norm() / one.norm() < 0.05
    masters = load_checkpoint(tmp_path / "bfloat16" / "checkpoint-00000001").tensors["online"]
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}


def copied(run: Path, folder: Path) -> Path:
    """A run as it was before its third iteration."""
    shutil.copytree(run, folder / "on")
    shutil.rmtree(folder / "on" / "checkpoint-00000003")
    return folder


@pytest.mark.slow(days=31)
@pytest.mark.parametrize("processes", [1, 4])
def test_a_run_goes_on_with_other_numbers_of_processes(two: Path, one: Path, tmp_path: Path, processes: int):
    names = ["on"] if processes == 1 else ["on", "hybrid"]
    launch(copied(two / "replayed", tmp_path), *names, processes=processes)
    ends = [two / "replayed" / f"checkpoint-0000000{i}" for i in (3, 2)]
    assert same_update(tmp_path / "on" / "checkpoint-00000003", *ends)
    if processes == 4:
        check_gradients(tmp_path / "hybrid.gradients", one / "plain.gradients")
        there = [path.name for path in (tmp_path / "hybrid" / "checkpoint-00000001").glob("online.*")]
        assert sorted(there) == [f"online.shard-0000{i}-of-00002.safetensors" for i in (0, 1)]  # of equal copies, one
    else:  # and back: from one file to shards
        shutil.rmtree(tmp_path / "on" / "checkpoint-00000002")
        assert (tmp_path / "on" / "checkpoint-00000003" / "online.safetensors").is_file()
        shutil.move(tmp_path / "on", tmp_path / "further")
        launch(tmp_path, "further", processes=2)
        assert (tmp_path / "further" / "checkpoint-00000004" / "online.shard-00001-of-00002.safetensors").is_file()


@pytest.mark.slow(days=31)
def test_a_fault_on_one_process_ends_all_with_its_reason_and_loses_nothing(tmp_path: Path):
    ends = launch(tmp_path, "nan", "memory", processes=2)
    for rank in (0, 1):
        assert ends[rank, "nan"].startswith("UpdateRefused: update 2: loss=nan"), ends
    assert ends[1, "memory"].startswith("OutOfMemoryError: CUDA out of memory"), ends
    assert ends[0, "memory"].startswith("OtherProcessFailed: "), ends
    for name in ("nan", "memory"):
        assert load_checkpoint(tmp_path / name / "checkpoint-00000001").step == 1, name


@contextlib.contextmanager
def machine_of(count: int) -> Iterator[None]:
    before = os.environ.pop("LOCAL_WORLD_SIZE", None)
    os.environ["LOCAL_WORLD_SIZE"] = str(count)
    try:
        yield
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before


def shapes(**changes: object):
    return load_recipe("star-shapes", overrides=[f"{key}={value}" for key, value in changes.items()])


def test_what_should_not_be_sharded_is_refused_with_the_better_choice():
    adapters = shapes(**{"train.sharding": "full", "policy.lora_rank": 4})
    with pytest.raises(ValueError, match=r"adapters \(policy.lora_rank=4\).*plain data parallel.*sharding=none"):
        check_sharding(adapters, world_size=2)
    with pytest.raises(ValueError, match="ToySpec is no pipeline"):  # before anything is loaded
        check_before_weights(toy_recipe.clipped(sharding="full"), world_size=2)
    hybrid = shapes(**{"train.sharding": "hybrid"})
    for world_size, here in ((4, 4), (2, 1), (6, 4)):
        with machine_of(here), pytest.raises(ValueError, match=f"{world_size} processes, {here} on this machine"):
            check_sharding(hybrid, world_size=world_size)
    with machine_of(2):
        check_sharding(hybrid, world_size=4)
    check_sharding(shapes(**{"train.sharding": "full"}), world_size=3)


def test_sharding_leaves_hashes_and_runs_as_they_were():
    from rlt2i.runs.belonging import changed_rounding, continuity, rounding

    plain, sharded = shapes(), shapes(**{"train.sharding": "full"})
    assert plain.hash == shapes(**{"train.sharding": "none"}).hash != sharded.hash
    assert continuity(plain) == continuity(sharded)
    assert "train.sharding none -> full" in changed_rounding({"rounding": rounding(plain)}, sharded)
