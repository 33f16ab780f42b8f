"""A recipe: five parts, a task, and how to train. YAML and Python give the same record."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import attrs

from rlt2i.algorithm import Algorithm
from rlt2i.config import (
    ConfigError,
    apply_overrides,
    build,
    dump_yaml,
    load_object,
    recipe_hash,
    renamed_paths,
    to_mapping,
)
from rlt2i.config.trust import foreign
from rlt2i.inputs.textfiles import user_path
from rlt2i.interfaces import CreditAssigner, Objective, PolicySpec, Reward, Sampler
from rlt2i.recipes.catalogue import find_recipe
from rlt2i.recipes.extends import read_recipe
from rlt2i.recipes.parts import PARTS
from rlt2i.recipes.train_config import TrainConfig
from rlt2i.tasks.base import Task

Part = TypeVar("Part")
Evidence = Literal["gated", "curve", "smoke", "rehearsed", "unrun"]


@attrs.frozen(kw_only=True)
class Recipe:
    """A named composition.

    Attributes:
        name: of the recipe; run directories start with it.
        about: one line for `rlt2i list`.
        evidence: `gated` (a committed curve that a test re-checks), `curve` (a full run's curve is committed), `smoke`
            (runs), `rehearsed` (runs with its own settings on a tiny model of the same classes; `rlt2i rehearse`), or
            `unrun` (not even that). The last two were never run with their real weights.
        policy, sampler, reward, credit, objective: the five parts of the algorithm.
        heldout: name -> a reward that is never trained on, scored at every evaluation beside the trained one. It shows
            whether the policy got better or only better at the trained reward; it cannot change the training.
        task: where the prompts come from.
        train: how long, how fast, how often.
    """

    name: str = attrs.field()
    about: str = ""
    evidence: Evidence = "unrun"
    policy: PolicySpec
    sampler: Sampler
    reward: Reward
    heldout: Mapping[str, Reward] = attrs.field(factory=dict)
    credit: CreditAssigner
    objective: Objective
    task: Task
    train: TrainConfig = attrs.field()

    @name.validator
    def _check_name(self, _: Any, value: str) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", value):
            raise ValueError(
                f"Recipe(name={value!r}): run directories start with it, so it takes lower-case letters, digits, '.', "
                "'_' and '-' only."
            )

    @heldout.validator
    def _check_heldout(self, _: Any, value: Mapping[str, Reward]) -> None:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(
                    f"Recipe(heldout={{{name!r}: ...}}): the name becomes the metric eval/heldout/{name}, so it takes "
                    "letters, digits, '_', '.' and '-' only."
                )

    @train.validator
    def _check_train(self, _: Any, value: TrainConfig) -> None:
        if value.group_size < 2 and self.objective.uses_advantage:
            raise ValueError(
                f"group_size={value.group_size}: {type(self.objective).__name__} learns from advantages, which compare "
                "the rollouts of one prompt with each other; a group of one has no spread, so every advantage would be "
                "0. Use group_size=2 or more (8 to 24 work well), or an objective that follows the reward's gradient, "
                "such as DRaFT()."
            )

    def algorithm(self) -> Algorithm:
        """The five parts, checked against each other; no weight is read.

        Raises:
            ValueError: when they do not fit, saying what to change.
        """
        return Algorithm(
            policy=self.policy,
            sampler=self.sampler,
            reward=self.reward,
            credit=self.credit,
            objective=self.objective,
        )

    def mapping(self) -> dict[str, Any]:
        """The resolved recipe as plain data: every field of every part, defaults included."""
        return to_mapping(self, parts=PARTS, typed=False)

    def to_yaml(self) -> str:
        """The resolved recipe as a recipe file that gives the same recipe again."""
        return dump_yaml(self.mapping())

    @property
    def hash(self) -> str:
        """SHA-256 of everything that can change the results."""
        return recipe_hash(to_mapping(self, parts=PARTS, typed=False, hashed=True))


def build_part(expected: type[Part], mapping: Any, *, path: str = "", folder: Path | None = None) -> Part:
    """`rlt2i.config.build` with the short names of this package."""
    return build(expected, mapping, path=path, parts=PARTS, folder=folder)


def recipe_from_mapping(mapping: Mapping[str, Any], *, folder: Path | None = None) -> Recipe:
    """The recipe that a mapping describes.

    Raises:
        ConfigError: naming the field that is wrong.
    """
    return build_part(Recipe, mapping, folder=folder)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), *, trusted: bool | None = None) -> Recipe:
    """A shipped recipe by name, a YAML file, that of a run directory, or a `module:function` that returns a Recipe.

    Args:
        name_or_path: which.
        overrides: `section.field=value`, see `apply_overrides`.
        trusted: whether any code that it names may run; by default that of a run directory may not, unless it is
            installed or has been run here before (`rlt2i.config.trust`).

    Raises:
        ConfigError: naming the file and the field that is wrong.
    """
    path = find_recipe(str(name_or_path))
    if isinstance(path, Path):
        mapping = read_recipe(path)
        if trusted is None:
            trusted = not user_path(str(name_or_path)).is_dir()
        try:
            with contextlib.nullcontext() if trusted else foreign(path.parent):
                recipe = recipe_from_mapping(mapping, folder=path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    else:
        function = load_object(path)
        recipe = function() if callable(function) else function
        if not isinstance(recipe, Recipe):
            raise ConfigError(f"{path}: returned {type(recipe).__name__}, expected a Recipe.")
    if not overrides:
        return recipe
    return recipe_from_mapping(apply_overrides(recipe.mapping(), overrides, renamed=renamed_paths(recipe)))
