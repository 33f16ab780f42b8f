"""STAR as shipped acts: a clear map makes the credit of every star-* recipe spatial, at the grid that it trains at."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.config import ConfigError, build
from rlt2i.credit.text_attention import TextAttention
from rlt2i.functional.maps import effective_support
from rlt2i.recipes import list_recipes, load_recipe
from tests.helpers.credit_contexts import make_context

STAR = [entry.name for entry in list_recipes() if entry.name.startswith("star-")]


def block_map(side: int) -> torch.Tensor:
    """[1, 1, 1, side, side]: ten times as bright on a rectangle of about a tenth of the area."""
    maps = torch.ones(1, 1, 1, side, side)
    height = max(2, round(side * 0.1**0.5))
    maps[..., 1 : 1 + height, 1 : 1 + round(0.1 * side * side / height)] = 10.0
    return maps


@pytest.mark.parametrize("name", STAR)
def test_a_clear_map_leaves_its_mark_at_the_recipes_grid_and_at_every_other(name: str):
    recipe = load_recipe(name)
    (attention,) = [part for part in recipe.credit.allocations if isinstance(part, TextAttention)]
    own = 32 if recipe.train.image_size == 512 else 8  # tokens a side: 16 pixels each, 4 on the embedded model
    context = make_context([0.0], group_size=1, num_steps=1, stochastic=(0,))
    for side in {own, 8, 16, 32, 64}:
        trajectory = attrs.evolve(context.trajectory, captures={attention.capture: block_map(side)})
        weight = attention.weight(attrs.evolve(context, trajectory=trajectory))
        assert effective_support(weight).item() < 0.95, f"{name} at {side} x {side} tokens is uniform credit"


def test_there_are_star_recipes():
    assert len(STAR) >= 7


def test_the_old_key_is_refused_with_the_new_name():
    with pytest.raises(ConfigError, match=r"entropy_power: TextAttention has no such field: it is called 'doubt' now"):
        build(TextAttention, {"entropy_power": 1.0})
