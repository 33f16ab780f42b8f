"""Named compositions: YAML files of `library/`, YAML files of yours, or Python functions that return a `Recipe`."""

from __future__ import annotations

from typing import Any

from rlt2i.recipes.catalogue import RecipeEntry, list_recipes
from rlt2i.recipes.parts import PARTS

__all__ = [
    "PARTS",
    "Evidence",
    "Recipe",
    "RecipeEntry",
    "build_part",
    "list_recipes",
    "load_recipe",
    "recipe_from_mapping",
]


def __getattr__(name: str) -> Any:
    """Imports the record on first use, so that listing recipes stays free of torch."""
    if name in __all__:
        from rlt2i.recipes import recipe

        return getattr(recipe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
