"""The controls of a recipe's map: without them a gain says nothing about the map."""

from __future__ import annotations

import attrs

from rlt2i.credit.algebra import Allocation, Product
from rlt2i.credit.controls import Inverted, Oracle, Shuffled
from rlt2i.interfaces import CreditAssigner
from rlt2i.recipes.recipe import Recipe


def controls_of(recipe: Recipe) -> dict[str, CreditAssigner]:
    """Uniform credit first, then the recipe's own, its map permuted and turned around, and the oracle where possible.

    Raises:
        ValueError: when the recipe's credit has no map over places to control for.
    """
    credit = recipe.credit
    maps = [a for a in credit.allocations if _resolves_places(a)] if isinstance(credit, Product) else []
    if not isinstance(credit, Product) or len(maps) != 1:
        raise ValueError(
            f"probe: the credit of {recipe.name} has {len(maps)} maps over places; the controls are made from exactly "
            "one. Use a recipe such as star-cells."
        )
    (own,) = maps
    rest = tuple(a for a in credit.allocations if a is not own)

    def with_map(*allocation: Allocation) -> Product:
        return attrs.evolve(credit, allocations=(*allocation, *rest))

    controls: dict[str, CreditAssigner] = {
        "uniform": with_map(),
        "own map": credit,
        "shuffled": with_map(Shuffled(allocation=own)),
        "inverted": with_map(Inverted(allocation=own)),
    }
    if "maps" in recipe.reward.offers:
        controls["oracle"] = with_map(Oracle(mix=getattr(own, "mix", 0.5)))
    return controls


def _resolves_places(allocation: Allocation) -> bool:
    """Whether an allocation looks at something that has places: captures, regions or gradients."""
    return bool(allocation.needs.names - {"noise", "groups", "clean_predictions"})
