"""Published settings and the recipe of the embedded task are about one objective (pages: test_algorithm_pages.py)."""

from __future__ import annotations

import pytest

from rlt2i.recipes import load_recipe


@pytest.mark.parametrize("name", ["guard", "nft", "awm", "dgpo", "crd", "dppo"])
def test_published_settings_use_the_objective_of_the_page(name: str):
    small = {"nft": "uniform-nft-shapes"}.get(name, f"{name}-shapes")
    assert type(load_recipe(f"{name}-sd35-geneval").objective) is type(load_recipe(small).objective)
