"""Settings that every test shares. They must be in force before torch or a model library is imported."""

from __future__ import annotations

import datetime
import os
import zlib

os.environ["HF_HUB_OFFLINE"] = "0" if os.environ.get("RLT2I_HUB") == "1" else "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
SLOW = os.environ.get("RLT2I_SLOW", "share")
"""Slow tests: "share" runs a twelfth of them, another one every day; "all" all, "none" none."""
DAY = datetime.date.fromisoformat(os.environ.setdefault("RLT2I_DAY", datetime.date.today().isoformat()))
"""Whose share it is. Workers inherit it, so that all of them agree when a run begins before midnight."""
SHARES = 12
"""Days until every slow test has had its turn; `@pytest.mark.slow(days=N)` where that is too much for a day."""


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def of_today(nodeid: str, days: int = SHARES, together: bool = False) -> bool:
    """Whether a slow test belongs to the day's share; `together`: with the other slow tests of its file."""
    turn = nodeid.partition("::")[0] if together else nodeid
    return zlib.crc32(turn.encode()) % days == DAY.toordinal() % days


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why; leave out slow tests that are not today's."""
    if SLOW != "all" and not config.option.markexpr and not any("::" in argument for argument in config.args):
        slow = {item: mark for item in items if (mark := item.get_closest_marker("slow"))}
        left = [item for item, mark in slow.items() if SLOW == "none" or not of_today(item.nodeid, **mark.kwargs)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_hub = pytest.mark.skip(reason="needs the network and real weights: set RLT2I_HUB=1")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("hub") and os.environ.get("RLT2I_HUB") != "1":
            item.add_marker(no_hub)
