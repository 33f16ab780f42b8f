"""A benchmark as data: arms, what they are compared with, seeds, and how they are judged.

A plan is a YAML file, shipped (`rlt2i bench cells-clipped`) or your own. An arm is a recipe, or a recipe with some
fields changed; everything that is not the arm's own question must be the same for all, and is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs.validators import ge, gt, lt

from rlt2i.config import ConfigError, apply_overrides, build, read_yaml
from rlt2i.config.references import did_you_mean
from rlt2i.inputs.textfiles import user_path
from rlt2i.recipes.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parent / "plans"

SHARED = (
    "iterations",
    "prompts_per_iteration",
    "group_size",
    "image_size",
    "sizes",
    "eval_every",
    "eval_prompts",
    "eval_steps",
    "eval_seed",
)
"""Fields of `train` that must agree: without them two arms share neither samples nor evaluations."""

FORCED = {"train.trackers": [], "train.keep_checkpoints": 1}
"""What a benchmark keeps of a run does not depend on the recipe."""


@attrs.frozen(kw_only=True)
class Arm:
    """One of the things compared.

    Attributes:
        recipe: name or YAML file, as for `rlt2i train`.
        label: how tables and figures call it; default the arm's own name.
        set: fields to change, `section.field` -> value, after those of the plan.
    """

    recipe: str
    label: str = ""
    set: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Trend:
    """A number that some arms differ in, and that their scores may rise or fall with: one test instead of many.

    Attributes:
        over: what the number is.
        levels: arm -> its number; three arms or more, not all at one level.
    """

    over: str
    levels: Mapping[str, float] = attrs.field()

    @levels.validator
    def _check_levels(self, _: Any, value: Mapping[str, float]) -> None:
        if len(value) < 3 or len(set(value.values())) < 2:
            raise ValueError(
                f"Trend(levels={dict(value)}): a line needs three arms or more that are not all at one level. Compare "
                "two arms with `contrasts`."
            )


@attrs.frozen(kw_only=True)
class Plan:
    """What to run and how to judge it.

    Attributes:
        name: folders start with it.
        question: what the benchmark is to answer, one sentence.
        arms: name -> arm, in the order of tables.
        reference: the arm that the others are compared with.
        contrasts: further pairs of arms to compare, [this, with that].
        trend: a number that the score may rise with, tested by itself beside the comparisons; None for none.
        seeds: how many, counted from `first_seed`. More may be asked for later; finished ones are kept.
        first_seed: of the training runs.
        metric: held-out score that decides, a component of the reward or "reward".
        margin: the smallest difference of the metric that would matter; equivalence is shown against it.
        alpha: chance of a false alarm among all arms.
        set: fields to change in every arm.
        threads: of each process.
        keep_runs: keep the run directories, weights included.
    """

    name: str = attrs.field()
    question: str
    arms: Mapping[str, Arm] = attrs.field()
    reference: str = attrs.field()
    contrasts: tuple[tuple[str, str], ...] = attrs.field(default=())
    trend: Trend | None = attrs.field(default=None)
    seeds: int = attrs.field(default=10, validator=ge(1))
    first_seed: int = attrs.field(default=0, validator=ge(0))
    metric: str = "strict"
    margin: float = attrs.field(validator=gt(0))
    alpha: float = attrs.field(default=0.05, validator=[gt(0), lt(1)])
    set: Mapping[str, Any] = attrs.field(factory=dict)
    threads: int = attrs.field(default=1, validator=ge(1))
    keep_runs: bool = False

    @name.validator
    def _check_name(self, _: Any, value: str) -> None:
        _check_word("Plan.name", value)

    @arms.validator
    def _check_arms(self, _: Any, value: Mapping[str, Arm]) -> None:
        if len(value) < 2:
            raise ValueError(f"Plan(arms={list(value)}): a comparison needs two arms or more.")
        for name in value:
            _check_word("Plan.arms", name)

    @reference.validator
    def _check_reference(self, _: Any, value: str) -> None:
        self._check_arm("reference", value)

    @contrasts.validator
    def _check_contrasts(self, _: Any, value: Sequence[tuple[str, str]]) -> None:
        for arm in (arm for pair in value for arm in pair):
            self._check_arm("contrasts", arm)

    @trend.validator
    def _check_trend(self, _: Any, value: Trend | None) -> None:
        for arm in value.levels if value else ():
            self._check_arm("trend.levels", arm)

    def _check_arm(self, where: str, arm: str) -> None:
        if arm not in self.arms:
            known = ", ".join(self.arms)
            raise ValueError(f"Plan({where}: {arm!r}): no such arm{did_you_mean(arm, self.arms)} It has: {known}.")

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """(arm, compared with), all of which are judged together."""
        return [(arm, self.reference) for arm in self.arms if arm != self.reference] + list(self.contrasts)

    @property
    def trials(self) -> list[tuple[str, int]]:
        """(arm, seed) in the order they run: all arms of a seed before the next, so that part of a run is paired."""
        return [(arm, self.first_seed + i) for i in range(self.seeds) for arm in self.arms]

    def label(self, arm: str) -> str:
        return self.arms[arm].label or arm

    def recipe(self, arm: str) -> Recipe:
        """The recipe of an arm, at seed `first_seed`.

        Raises:
            ConfigError: naming the arm, where its recipe cannot be built.
        """
        changes = {**self.set, **self.arms[arm].set, **FORCED, "train.seed": self.first_seed}
        try:
            return load_recipe(self.arms[arm].recipe, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
        except ConfigError as error:
            raise ConfigError(f"{self.name}: arms.{arm}: {error}") from None

    def recipes(self) -> dict[str, Recipe]:
        """The recipe of every arm, checked to differ in nothing but what may differ.

        Raises:
            ConfigError: naming the arm and the field.
        """
        recipes = {arm: self.recipe(arm) for arm in self.arms}
        check_common(recipes, self.reference)
        return recipes


def _check_word(where: str, value: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", value):
        raise ValueError(f"{where}: {value!r} names folders, so it takes lower-case letters, digits, '.', '_', '-'.")


def check_common(recipes: Mapping[str, Recipe], reference: str) -> None:
    """Arms are paired only if they start from one policy and share prompts, samples, reward and evaluations.

    Raises:
        ConfigError: naming the first field in which an arm differs from the reference.
    """
    wanted = _common(recipes[reference])
    for arm, recipe in recipes.items():
        for key, value in _common(recipe).items():
            if value != wanted[key]:
                raise ConfigError(
                    f"arms.{arm}: {key} is {value!r}, and {wanted[key]!r} in the reference {reference}. Arms must "
                    f"share it to be paired: set {key} for all of them in the plan's `set`."
                )


def _common(recipe: Recipe) -> dict[str, Any]:
    mapping = recipe.mapping()
    train = mapping["train"]
    whole = {key: mapping[key] for key in ("policy", "task", "reward", "heldout")}
    return whole | {f"train.{key}": train[key] for key in SHARED}


# ----------------------------------------------------------------------------------------------------------- files


def shipped_plans() -> dict[str, Path]:
    """Name -> file of the plans that ship with the package."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_plan(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """A shipped plan by name, or a YAML file.

    Args:
        overrides: `field=value` of the plan itself (`seeds=20`, `set={train.iterations: 5}`).

    Raises:
        ConfigError: when there is no such plan, naming those that ship; or naming the field that is wrong.
    """
    files = shipped_plans()
    path = files.get(str(name_or_path), user_path(name_or_path))
    if not path.is_file():
        raise ConfigError(
            f"{name_or_path}: no such plan{did_you_mean(str(name_or_path), files)} Shipped: {', '.join(files)}. Or "
            "give a YAML file."
        )
    try:
        return build(Plan, apply_overrides(read_yaml(path), overrides), folder=path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
