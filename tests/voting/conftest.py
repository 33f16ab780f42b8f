"""A page with pairs to vote on, and somebody who votes without a browser."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rlt2i.voting.booth import Booth
from rlt2i.voting.folder import Slate, VoteFolder


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: renders in headless Chromium (skipped where it is not installed)")


def pictures(count: int, *, seed: int = 0, side: int = 8) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=draw)


@pytest.fixture
def booth(tmp_path: Path) -> Booth:
    return Booth(VoteFolder(tmp_path / "votes"))


@pytest.fixture
def slates(booth: Booth) -> list[Slate]:
    """Three prompts of two images each, put to the vote."""
    kept = [booth.folder.keep(pictures(2, seed=i), f"prompt {i}", {}) for i in range(3)]
    booth.ask(kept)
    return kept


@pytest.fixture
def person() -> Iterator[Callable[[Booth, Callable[[str, str, str], str]], None]]:
    """Starts a thread that answers every question of a booth with what a function of (prompt, left, right) says."""
    over = threading.Event()
    threads = []

    def start(booth: Booth, decide: Callable[[str, str, str], str]) -> None:
        def act() -> None:
            while not over.wait(0.005):
                question = booth.state()["question"]
                if question is not None:
                    choice = decide(question["prompt"], question["left"], question["right"])
                    booth.vote(question["name"], choice)  # type: ignore[arg-type]

        threads.append(threading.Thread(target=act, daemon=True))
        threads[-1].start()

    yield start
    over.set()
    for thread in threads:
        thread.join(5)
