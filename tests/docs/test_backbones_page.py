"""The page of backbones says what the classes say, and its counts are those of the code."""

from __future__ import annotations

import pytest

from benchmarks import backbones_page as pages
from rlt2i.config import load_object
from rlt2i.policies.tiny import TINY
from rlt2i.recipes import list_recipes, load_recipe
from rlt2i.recipes.parts import PARTS
from rlt2i.training.dry_run import batch_plan, plan_of
from rlt2i.training.fitting import find_device, tight_phases


def test_the_page_holds_the_table_of_the_classes():
    page = pages.PAGE.read_text(encoding="utf-8")
    assert page == pages.composed(page), "run python -m benchmarks.backbones_page"
    for name in PARTS["PolicySpec"]:
        assert f"| `{name}` |" in page, name


def test_every_published_pipeline_says_its_licence_and_gate():
    counts = pages.read_counts()
    for spec in pages.published():
        assert spec.licences[spec.path]
    assert all(0 < each.capture_percent < 5 for each in counts.values())


def test_a_count_is_that_of_today():
    spec = next(spec for spec in pages.published() if spec.path.startswith("stable-diffusion-v1-5"))
    assert pages.count(spec, 512) == pages.read_counts()[spec.path, 512]


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in list_recipes() if entry.name.endswith("-24gb")])
def test_recipes_for_small_cards_fit_them_by_the_plan(name):
    recipe = load_recipe(name)
    plan = plan_of(recipe, batch_plan(recipe, world_size=1))
    assert tight_phases(plan, find_device("24GB")) == [], plan.table()


def test_every_policy_has_a_tiny_pipeline():
    for reference in PARTS["PolicySpec"].values():
        assert load_object(reference).pipeline in TINY
