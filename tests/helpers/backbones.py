"""Backbones that tests try seldom, because another one of much the same build is always tried."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

SELDOM = frozenset({"AuraFlow", "Flux2", "Krea2", "QwenImage21"})


def marked(names: Iterable[str]) -> list[Any]:
    """Names of policy specs as parameters of a test, those of SELDOM marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in names]
