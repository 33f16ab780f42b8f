"""Every shipped recipe runs with its own settings: trained, killed, resumed, reported, exported, loaded elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlt2i.recipes import list_recipes, load_recipe
from rlt2i.rehearsal.acts import rehearse

NAMES = [entry.name for entry in list_recipes()]
ALWAYS = ("star-sd35-ocr", "star-nft-sd35-geneval", "nft-sd35-geneval", "dpo-sd35-geneval", "star-cells", "ddpo-shapes")
"""Rehearsed by every `make test`; of the others an eighth, another one every day."""
COMPILED = ("star-sd35-geneval",)


def passes(name: str, folder: Path, *, compile_blocks: bool = False) -> None:
    done = rehearse(load_recipe(name), folder, compile_blocks=compile_blocks)
    assert done.passed, done.table()
    assert [act.name for act in done.acts] == ["prepare", "plan", "kill", "resume", "report", "export"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow(days=24))
        for name in NAMES
        if name not in COMPILED
    ],
)
def test_a_shipped_recipe_passes_its_rehearsal(name: str, tmp_path: Path):
    passes(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_recipe_passes_its_rehearsal(name: str, tmp_path: Path):
    passes(name, tmp_path, compile_blocks=True)
