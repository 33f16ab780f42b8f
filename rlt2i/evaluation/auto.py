"""`blocks: auto`: choose the attention map by measurement, on tasks whose regions are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from rlt2i.captures import AUTO
from rlt2i.evaluation.localisation import Localisation, measure_localisation
from rlt2i.recipes.recipe import Recipe
from rlt2i.tasks.base import as_prompts

PROBES = 96
"""Held-in images that the choice is made on."""


def asks_for_auto(recipe: Recipe) -> bool:
    """Whether any part of the credit is to be chosen by measurement."""
    return bool(_fields(recipe.mapping()["credit"]))


def resolve_auto(recipe: Recipe, *, device: torch.device | str = "cpu") -> tuple[Recipe, Localisation | None]:
    """The recipe with every `blocks: auto` replaced by the direction and block that localise best.

    Sampled from *training* prompts of the unchanged policy, with a seed of its own. A direction that the recipe names
    is kept; `direction: auto` is chosen too.

    Returns:
        The resolved recipe, and the measurement, or None where nothing was to be chosen.

    Raises:
        ValueError: when the reward does not know where its objects are.
    """
    if not asks_for_auto(recipe):
        return recipe, None
    from rlt2i.recipes.recipe import recipe_from_mapping

    algorithm = recipe.algorithm().load(device)
    train = recipe.train
    prompts = as_prompts(recipe.task.train_prompts(seed=train.seed, start=0, count=PROBES), group_size=1)
    measured = measure_localisation(
        algorithm.policy,  # type: ignore[arg-type]  # loaded above
        recipe.reward,
        prompts,
        num_steps=recipe.sampler.num_steps,
        image_size=train.image_size,
        rollout_batch_size=train.rollout_batch_size,
        seed=train.seed,
        device=device,
    )
    mapping = recipe.mapping()
    for part in _fields(mapping["credit"]):
        kept = {key: v for key, v in measured.auc.items() if part["direction"] in (AUTO, key[0])}
        direction, block = attrs.evolve(measured, auc=kept).best()
        part["direction"], part["blocks"] = direction, str(block)
    return recipe_from_mapping(mapping), measured


def _fields(node: Any) -> list[dict[str, Any]]:
    """Every mapping below `node` whose blocks are `auto`."""
    if isinstance(node, Mapping):
        own = [node] if node.get("blocks") == AUTO else []
        return [*own, *(field for value in node.values() for field in _fields(value))]  # type: ignore[list-item]
    if isinstance(node, list | tuple):
        return [field for value in node for field in _fields(value)]
    return []
