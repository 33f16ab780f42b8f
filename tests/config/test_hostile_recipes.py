"""Files that no recipe is: each is one clear error, at once, however large it would grow."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from rlt2i.config import ConfigError, parse_yaml
from rlt2i.recipes import list_recipes, load_recipe
from rlt2i.recipes.recipe import recipe_from_mapping
from rlt2i.training.dry_run import batch_plan

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))

MERGES = "m0: &m0 {x: 1}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}], y{i}: 1}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 5000, "nested deeper"),
        ("{a: " * 5000, "nested deeper"),
        ("? [a, b]\n: c\n", "a key must be a word"),
        ("? {a: b}\n: c\n", "a key must be a word"),
        ("a: !!bool maybe\n", "tag"),
        ("a: !!python/object/apply:os.system [true]\n", "tag"),
        ("a: !!int x\n", "tag"),
        (LAUGHS, "more than 100000 values"),
        ("a: &a [*a]\n", "names nothing that is complete"),
        ("? &k [a]\n: 1\n", "a key must be a word"),
        ("k: &k [a]\n? *k\n: 1\n", "a key is no word"),
        (MERGES, "more than 100000 values"),
        ("a: {<<: 3}\n", "expected a mapping"),
        ("a: !foo bar\n", "tag"),
        ("a: !!binary aGk=\n", "tag"),
        ("%TAG ! tag:x,2000:\n---\na: !q 1\n", "tag"),
        ("1: a\n1.0: b\n", "appears twice"),
        ("'a': 1\n\"a\": 2\n", "appears twice"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("a: \0\n", "not valid YAML"),
        ("a: " + "9" * 5000, "thousands of digits"),
        ("a: " + "b" * 3_000_000, "more than 200,000"),
    ],
)
def test_text_that_is_no_recipe_is_refused_at_once(text: str, says: str):
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.perf_counter() - start < 5  # on the busiest of machines; 25 s before


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), "x" * 10**6, list(range(10**5))])
def test_a_value_of_any_size_is_shown_in_a_line(value: Any):
    mapping = load_recipe("star-shapes").mapping()
    mapping["train"]["learning_rate"] = value
    with pytest.raises(ConfigError, match=r"train\.learning_rate") as caught:
        recipe_from_mapping(mapping)
    assert len(str(caught.value)) < 2000


BAD = (10**18, 10**9, float("inf"), float("-inf"), float("nan"), -1, 0, 1, "x", [1], {"a": 1}, None, True, 1e300)


def places(mapping: Mapping[str, Any], above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field, the fields of parts inside lists included."""
    for key, value in mapping.items():
        yield (*above, key)
        inside = value if isinstance(value, list) else [value]
        for index, item in enumerate(inside):
            if isinstance(item, Mapping):
                yield from places(item, (*above, key, index) if isinstance(value, list) else (*above, key))


def put(mapping: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(mapping)
    inside: Any = changed
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    return changed


def refused_or_fine(mapping: dict[str, Any]) -> None:
    """Everything that can be known without weights, or one error for the user in less than a page."""
    said = ""
    try:
        recipe = recipe_from_mapping(mapping)
        recipe.algorithm().check_group_size(recipe.train.group_size)
        batch_plan(recipe, world_size=1)
    except ValueError as error:  # ConfigError is one
        said = str(error)
    assert len(said) < 2000, said[:200]


@pytest.mark.parametrize("name", ["star-shapes", "branch-grpo-shapes", "star-awm-sd35-geneval", "draft-shapes"])
def test_every_field_with_every_bad_value(name: str):
    mapping = load_recipe(name).mapping()
    for place in places(mapping):
        for value in BAD:
            refused_or_fine(put(mapping, place, value))


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_recipes(count: int):
    draw = random.Random(0)
    recipes = [load_recipe(entry.name).mapping() for entry in list_recipes()[::9]]
    for _ in range(count):
        mapping = draw.choice(recipes)
        found = list(places(mapping))
        for _ in range(draw.randint(1, 3)):
            place = draw.choice(found)
            try:
                mapping = put(mapping, place, draw.choice(BAD))
            except (KeyError, IndexError, TypeError):  # an earlier change took this place away
                continue
        refused_or_fine(mapping)
