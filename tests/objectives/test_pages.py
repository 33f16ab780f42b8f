"""The page of an algorithm shows the composition of its recipe and explains every field."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

from rlt2i.interfaces import Objective, Sampler
from rlt2i.recipes import build_part, load_recipe
from rlt2i.references import parse_yaml

DOCS = Path(__file__).parents[2] / "docs" / "algorithms"
OBJECTIVES = ["guard", "dppo", "reinforce", "awm", "dgpo", "crd", "sft"]
SAMPLERS = ["mixgrpo", "flow-grpo-fast"]


@pytest.mark.parametrize("page", [*OBJECTIVES, *SAMPLERS])
def test_the_composition_on_the_page_is_that_of_the_recipe(page: str):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    recipe = load_recipe(f"{page}-shapes")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    key, kind = ("objective", Objective) if page in OBJECTIVES else ("sampler", Sampler)
    part = build_part(kind, parse_yaml(block)[key])  # type: ignore[type-abstract]
    assert part == getattr(recipe, key)
    for word in ("Parameters", "Logged", "Results", "Differences", "References", f"rlt2i train {page}-shapes"):
        assert word in text, f"{page}.md says nothing of {word}"
    for field in attrs.fields(type(part)):
        assert f"`{field.name}`" in text or f"{field.name}:" in text, f"{page}.md does not explain {field.name}"


@pytest.mark.parametrize("name", ["guard", "nft", "awm", "dgpo"])
def test_published_settings_use_the_objective_of_the_page(name: str):
    small = {"nft": "uniform-nft-shapes"}.get(name, f"{name}-shapes")
    assert type(load_recipe(f"{name}-sd35-geneval").objective) is type(load_recipe(small).objective)
