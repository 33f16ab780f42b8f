"""Clients are closed after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.servers import OPENED


@pytest.fixture(autouse=True)
def closed_clients() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()
