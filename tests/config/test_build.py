"""Strict configuration: what is refused, in which words; what round-trips; what a hash depends on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlt2i.config import ConfigError, apply_overrides, build, dump_yaml, parse_yaml, read_yaml, recipe_hash, to_mapping
from tests.helpers.config_parts import PARTS, Circle, Drawing, Margins, Red, Shape, Square

FULL = {
    "title": "house",
    "shape": {"type": "Square", "side": 2, "tilt": -5, "corner": "round"},
    "count": 3,
    "mix": 1,
    "scale": 0.5,
    "blocks": 7,
    "filled": True,
    "style": "bold",
    "size": [8, 9],
    "levels": [1, 0.5],
    "tags": ["b", "a"],
    "more": ["Circle", {"type": "Circle", "radius": 2.0}],
    "named": {"roof": {"type": "Circle"}},
    "weights": {"x": 1, "y": 0.5},
    "paint": "Red",
    "margins": {"right": 5},
    "path": "a/b",
}


def drawing(**changes: Any) -> Drawing:
    return build(Drawing, {"title": "t", "shape": "Circle", **changes}, parts=PARTS)


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        drawing(**changes)
    return str(caught.value)


def test_every_kind_of_field_is_built():
    expected = Drawing(
        title="house",
        shape=Square(side=2.0, tilt=-5, corner="round"),
        count=3,
        mix=1.0,
        scale=0.5,
        blocks=7,
        filled=True,
        style="bold",
        size=(8, 9),
        levels=(1.0, 0.5),
        tags=frozenset({"a", "b"}),
        more=(Circle(), Circle(radius=2.0)),
        named={"roof": Circle()},
        weights={"x": 1.0, "y": 0.5},
        paint=Red(),
        margins=Margins(right=5),
        path=Path("a/b"),
    )
    built = build(Drawing, FULL, parts=PARTS)
    assert built == expected
    assert [type(level) for level in (built.mix, *built.levels, built.weights["x"])] == [float] * 4


def test_round_trip_is_exact_and_spells_out_defaults():
    built = build(Drawing, FULL, parts=PARTS)
    mapping = to_mapping(built, parts=PARTS, typed=False)
    assert build(Drawing, mapping, parts=PARTS) == built
    assert build(Drawing, parse_yaml(dump_yaml(mapping)), parts=PARTS) == built
    assert mapping["shape"] == {"type": "Square", "side": 2.0, "tilt": -5, "corner": "round"}
    assert mapping["margins"] == {"left": 1, "right": 5}
    assert mapping["tags"] == ["a", "b"]
    assert "cache" not in mapping


def test_python_and_yaml_give_the_same_mapping_for_an_int_in_a_float_field():
    assert to_mapping(Circle(radius=2), parts=PARTS) == to_mapping(Circle(radius=2.0), parts=PARTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": "x"}, "mix: got 'x' (str), expected float in [0, 1]"),
        ({"mix": True}, "mix: got True (bool), expected float in [0, 1]"),
        ({"mix": 1.5}, "mix: got 1.5 (float), expected float in [0, 1]"),
        ({"mix": "0.5"}, "mix: got '0.5' (str), expected float in [0, 1]"),
        ({"count": 2.0}, "count: got 2.0 (float), expected int >= 1"),
        ({"count": True}, "count: got True (bool), expected int >= 1"),
        ({"count": 0}, "count: got 0 (int), expected int >= 1"),
        ({"count": None}, "count: got None (null), expected int >= 1"),
        ({"scale": 0}, "scale: got 0.0 (float), expected float > 0 or null"),
        ({"blocks": "aut"}, "blocks: got 'aut' (str), expected int or 'auto'"),
        ({"filled": "yes"}, "filled: got 'yes' (str), expected true or false"),
        ({"filled": 1}, "filled: got 1 (int), expected true or false"),
        ({"title": 3}, "title: got 3 (int), expected str; put it in quotes"),
        ({"style": "loud"}, "style: got 'loud' (str), expected str of {'plain', 'bold'}"),
        ({"size": [1]}, "size: got [1] (list), expected [int, int]"),
        ({"size": [1, 2.5]}, "size[1]: got 2.5 (float), expected int"),
        ({"levels": 1.0}, "levels: got 1.0 (float), expected a list of float"),
        ({"levels": [1, "x"]}, "levels[1]: got 'x' (str), expected float"),
        ({"weights": {"x": "y"}}, "weights.x: got 'y' (str), expected float"),
        ({"more": [{"type": "Circle", "radius": -1}]}, "more[0].radius: got -1.0 (float), expected float > 0"),
        ({"named": {"a": {"type": "Circle", "radius": "x"}}}, "named.a.radius: got 'x' (str), expected float > 0"),
        ({"margins": "wide"}, "margins: got 'wide' (str), expected Margins ({type: ..., field: value})"),
        ({"paint": {"type": "Red", "x": 1}}, "paint.x: Red has no such field.\nRed has: no fields."),
        ({"shape": {"type": "Square"}}, "shape.side: Square needs a value here: float."),
        ({"shape": {"type": "Square", "side": 1, "corner": "rond"}}, "'sharp' or 'round'; did you mean 'round'?"),
        ({"shape": {"type": "Square", "side": -1}}, "shape.side: Square(side=-1.0): a square needs an extent."),
        ({"filled": True}, "Drawing: Drawing(filled=True, paint=None): say which paint."),
        ({"shape": {"radius": 1}}, "shape.type: say which Shape is meant. Known: Circle, Square"),
        ({"shape": "Cirle"}, "shape.type: unknown Shape 'Cirle'; did you mean 'Circle'? Known: Circle, Square"),
        ({"shape": "Red"}, "shape.type: Red is of kind Paint, expected Shape."),
        ({"shape": 5}, "shape: got 5 (int), expected Shape ({type: ..., field: value})"),
        ({"shape": {"type": 5}}, "shape.type: got 5 (int), expected the name of a part"),
        ({"shape": "Unfinished"}, "shape.type: Unfinished must be a concrete class decorated with @attrs.frozen"),
        ({"shape": "tests.helpers.config_parts:Red"}, "is not a subclass of tests.helpers.config_parts.Shape"),
        (
            {"shape": "tests.helpers.config_parts:Cirle"},
            "tests.helpers.config_parts has no 'Cirle'; did you mean 'Circle'?",
        ),
        ({"shape": "no_such_module:X"}, "there is no module 'no_such_module' on the path"),
        ({"shape": "no_such_file.py:X"}, "no_such_file.py: no such file (looked for "),
        ({"cuont": 3}, "cuont: Drawing has no such field; did you mean 'count'?\nDrawing has: title, shape, count"),
        ({"cache": [1]}, "cache: Drawing has no such field"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], message: str):
    assert message in refusal(**changes)


def test_paths_are_dotted_from_where_the_mapping_sits():
    with pytest.raises(ConfigError, match=r"^credit\.allocations\.radius: got 'x' \(str\), expected float > 0$"):
        build(Shape, {"type": "Circle", "radius": "x"}, path="credit.allocations", parts=PARTS)


def test_a_missing_package_is_named(tmp_path: Path):
    (tmp_path / "needy.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        build(Shape, {"type": f"{tmp_path}/needy.py:X"}, parts=PARTS)


# ------------------------------------------------------------------------------------------------ out-of-tree parts

MINE = """
import attrs
from tests.helpers.config_parts import Shape

@attrs.frozen(kw_only=True)
class Mine(Shape):
    width: float = 1.0

    def area(self):
        return self.width
"""


def test_a_part_from_a_file_needs_no_edit_of_the_package(tmp_path: Path):
    (tmp_path / "mine.py").write_text(MINE)
    part = build(Shape, {"type": "mine.py:Mine", "width": 3}, parts=PARTS, folder=tmp_path)
    assert part.area() == 3.0
    mapping = to_mapping(part, parts=PARTS)
    assert mapping == {"type": f"{tmp_path.resolve()}/mine.py:Mine", "width": 3.0}
    assert build(Shape, mapping, parts=PARTS) == part


def test_a_module_path_becomes_its_short_name_again():
    part = build(Shape, {"type": "tests.helpers.config_parts:Circle"}, parts=PARTS)
    assert to_mapping(part, parts=PARTS)["type"] == "Circle"
    assert to_mapping(part)["type"] == "tests.helpers.config_parts:Circle"


def test_the_hash_follows_the_content_of_a_file_and_not_its_place(tmp_path: Path):
    hashes = []
    for folder, text in (("a", MINE), ("b", MINE), ("c", MINE + "\n# changed\n")):
        path = tmp_path / folder / "mine.py"
        path.parent.mkdir()
        path.write_text(text)
        hashes.append(recipe_hash({"shape": {"type": f"{path}:Mine"}}))
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_hash_ignores_words_and_order_and_nothing_else():
    mapping = {"name": "n", "about": "x", "evidence": "unrun", "train": {"seed": 0, "rate": 1e-4}}
    reordered = {"train": {"rate": 1e-4, "seed": 0}, "evidence": "curve", "about": "y", "name": "n"}
    assert recipe_hash(mapping) == recipe_hash(reordered)
    assert recipe_hash(mapping) != recipe_hash({**mapping, "train": {"seed": 1, "rate": 1e-4}})
    quiet = {"seed": 0, "rate": 1e-4, "trackers": ["wandb"], "checkpoint_every": 1, "keep_checkpoints": 9}
    watched = {**mapping, "train": quiet, "heldout": {"size": {"type": "JPEGCompressibility"}}}
    assert recipe_hash(mapping) == recipe_hash(watched)
    assert recipe_hash(mapping) != recipe_hash({**mapping, "task": {"trackers": []}})
    assert recipe_hash({"name": "n"}) == hashlib.sha256(b'{"name":"n"}').hexdigest()


# -------------------------------------------------------------------------------------------------------- overrides

RESOLVED = {
    "name": "r",
    "credit": {
        "type": "Product",
        "advantage": {"type": "GroupRelative", "clip": 5.0},
        "allocations": [{"type": "TextAttention", "mix": 0.5, "blur": 1.0}, {"type": "Oracle", "blur": 0.0}],
    },
    "reward": {"type": "Sum", "weights": {"a": 1.0}},
    "train": {"seed": 0, "betas": [0.9, 0.999], "ema_decay": None},
}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("credit.mix=0.7", ("credit", "allocations", 0, "mix"), 0.7),
        ("credit.clip=1e-1", ("credit", "advantage", "clip"), 0.1),
        ("credit.allocations.1.blur=2", ("credit", "allocations", 1, "blur"), 2),
        ("credit.allocations[1].blur=2", ("credit", "allocations", 1, "blur"), 2),
        ("train.seed=3", ("train", "seed"), 3),
        ("train.betas=[0.8, 0.9]", ("train", "betas"), [0.8, 0.9]),
        ("train.betas.1=0.95", ("train", "betas", 1), 0.95),
        ("train.ema_decay=0.9", ("train", "ema_decay"), 0.9),
        ("reward.weights.b=2", ("reward", "weights", "b"), 2),
        ("credit.allocations.2=Inverted", ("credit", "allocations", 2), "Inverted"),
        ("credit.advantage.type=StepGain", ("credit", "advantage"), {"type": "StepGain"}),
        ("credit.advantage={type: StepGain, clip: 1}", ("credit", "advantage"), {"type": "StepGain", "clip": 1}),
        ("name=a=b", ("name",), "a=b"),
    ],
)
def test_overrides(override: str, path: tuple[Any, ...], value: Any):
    found: Any = apply_overrides(RESOLVED, [override])
    for key in path:
        found = found[key]
    assert found == value


def test_a_replaced_part_takes_further_fields():
    changed = apply_overrides(RESOLVED, ["credit.advantage.type=StepGain", "credit.advantage.eps=0.1"])
    assert changed["credit"]["advantage"] == {"type": "StepGain", "eps": 0.1}


def test_overrides_leave_the_original_alone():
    before = repr(RESOLVED)
    apply_overrides(RESOLVED, ["credit.mix=0.7", "reward.weights.a=3"])
    assert repr(RESOLVED) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("credit.blur=1", "several fields match, name one: credit.allocations.0.blur, credit.allocations.1.blur"),
        ("credit.mixx=1", "there is no such field; did you mean 'mix'? Known: credit.type, "),
        ("train.sede=1", "there is no such field; did you mean 'seed'?"),
        ("credit.allocations.5.mix=1", "there is no such field"),
        ("mix=1", "a recipe has no 'mix'; did you mean credit.allocations.0.mix?"),
        ("trian.seed=1", "a recipe has no 'trian'; did you mean 'train'?"),
        ("train.seed", "write section.field=value"),
        ("train.seed={", "--set train.seed={: not valid YAML"),
    ],
)
def test_overrides_that_name_nothing_say_what_there_is(override: str, message: str):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(RESOLVED, [override])
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("-1E3", -1000.0), (".5", 0.5), ("5.", 5.0), (".inf", float("inf"))]
    + [("3", 3), ("-3", -3), ("1_000", 1000), ("true", True), ("null", None), ("~", None)]
    + [(word, word) for word in ("yes", "no", "on", "off", "1:30", "010", "2026-01-01", "e5", "1.2.3", "a:b")],
)
def test_yaml_scalars_mean_what_they_look_like(text: str, value: Any):
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_a_quoted_number_stays_a_word():
    assert parse_yaml("'1e-4'") == "1e-4"


def test_a_key_twice_is_an_error_that_names_file_and_line(tmp_path: Path):
    path = tmp_path / "twice.yaml"
    path.write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml: line 3: the key 'a' appears twice"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["[1, 2]", "", "just words", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml[:,] "):
        read_yaml(path)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(plain)
def test_yaml_round_trip_is_exact(value: Any):
    assert repr(parse_yaml(dump_yaml({"value": value}))["value"]) == repr(value)
