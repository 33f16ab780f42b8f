"""docs/benchmark.md says what the committed tables say, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.benchmark_page import BLOCK, BLOCKS, FIGURES, PAGE, page
from rlt2i.bench.plan import load_plan


def test_the_page_is_what_the_tables_say():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run: python -m benchmarks.benchmark_page"


def test_every_block_is_on_the_page():
    assert {match[2] for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))} == set(BLOCKS)


def test_the_plan_on_the_page_is_one(tmp_path: Path):
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    recipes = load_plan(tmp_path / "mine.yaml").recipes()
    assert len({recipe.hash for recipe in recipes.values()}) == 3


def test_its_figures_are_there():
    named = re.findall(r"assets/benchmark/([a-z-]+\.svg)", PAGE.read_text(encoding="utf-8"))
    assert all((FIGURES / name).is_file() for name in named)
