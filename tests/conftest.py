"""Settings that every test shares. They must be in force before torch or a model library is imported."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "0" if os.environ.get("RLT2I_HUB") == "1" else "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

THREADS = min(2, os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_hub = pytest.mark.skip(reason="needs the network and real weights: set RLT2I_HUB=1")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("hub") and os.environ.get("RLT2I_HUB") != "1":
            item.add_marker(no_hub)
