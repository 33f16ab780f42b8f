"""Gradients are summed over processes in few messages, to the same bits as one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from rlt2i.distributed import sum_in_buckets

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import sys, torch, torch.distributed as dist
from rlt2i.distributed import sum_in_buckets
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(rank)
shapes = [(3, 5), (), (7,), (0,), (2, 2, 2), (64,)] * 3
own = [torch.randn(shape, generator=generator) * 10.0 ** (i % 7 - 3) for i, shape in enumerate(shapes)]
own += [own[0].double(), own[1].to(torch.bfloat16)]
def add(tensor):
    dist.all_reduce(tensor)
    return tensor
one_by_one = [add(tensor.clone()) for tensor in own]
for size in (1, 100, 10**6):
    together = sum_in_buckets(own, add, bucket_bytes=size)
    assert all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(together, one_by_one))
dist.destroy_process_group()
"""


def test_tensors_travel_together_until_a_bucket_is_full_or_the_dtype_changes():
    sent: list[tuple[int, torch.dtype]] = []

    def double(flat: Tensor) -> Tensor:
        sent.append((flat.numel(), flat.dtype))
        return 2 * flat

    # 4 bytes a number, 40 a bucket: 4 + 6 numbers fill it, 12 go alone, 1 + 2 together, the float64 apart.
    own = [torch.ones(4), torch.ones(2, 3), torch.ones(12), torch.ones(1), torch.ones(2), torch.ones(1).double()]
    summed = sum_in_buckets(own, double, bucket_bytes=40)
    assert sent == [(10, torch.float32), (12, torch.float32), (3, torch.float32), (1, torch.float64)]
    assert all(torch.equal(found, 2 * tensor) for found, tensor in zip(summed, own, strict=True))
    assert sum_in_buckets([], double) == []


def test_two_processes_get_the_bits_of_summing_each_tensor_by_itself(tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    words = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "meet")], env=environment, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    errors = [worker.communicate(timeout=120)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
