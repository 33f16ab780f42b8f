"""Frozen attrs parts from plain mappings and back: strict, exact, and before any weight is read.

The parts *are* the configuration: there is no second class that mirrors their fields. `build` reads the annotations and
validators of a part, `to_mapping` is its inverse, and `recipe_hash` names the result. cattrs would structure the same
classes, but it cannot say which field of which file is wrong, what was meant, and what would be right.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import typing
from abc import ABCMeta
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs

from rlt2i.config.describe import accepts, describe, diagnose, mismatch
from rlt2i.config.references import (
    ConfigError,
    did_you_mean,
    is_reference,
    load_object,
    pin_files,
    reference_to,
)

Part = TypeVar("Part")
Parts = Mapping[str, Mapping[str, str]]
"""Name of an abstract part -> short name -> "module:Class"."""

_LARGEST = 2**63 - 1
"""Of whole numbers: what a tensor of integers holds."""
_EXACT = 10**300
_NEUTRAL = "rlt2i.neutral"
_IN_NO_HASH = (
    ("about",),
    ("evidence",),
    ("heldout",),
    ("policy", "text_cache"),
    ("policy", "text_encoders"),
    ("train", "trackers"),
    ("train", "checkpoint_every"),
    ("train", "keep_checkpoints"),
)
"""Fields of a recipe that decide what is said, watched or kept of a run, and nothing of what is learned."""
_SEQUENCES = {
    tuple: tuple,
    list: list,
    frozenset: frozenset,
    set: frozenset,
    typing.get_origin(typing.Sequence): tuple,
}
_MAPPINGS = (dict, typing.get_origin(typing.Mapping))


def build(
    expected: type[Part],
    mapping: Any,
    *,
    path: str = "",
    parts: Parts | None = None,
    folder: Path | None = None,
) -> Part:
    """The part that a mapping describes.

    Args:
        expected: what it must be an instance of; an abstract class needs a `type` in the mapping.
        mapping: `{"type": name, field: value, ...}`, or just the name when every field keeps its default. A name is a
            short name of `parts`, `module:Class`, or `file.py:Class`.
        path: where the mapping sits, for error messages.
        parts: the short names.
        folder: where `file.py` is looked up besides the working directory.

    Raises:
        ConfigError: on an unknown name or field, a missing field, a wrong type, or a value that the part refuses.
    """
    return _Builder(parts or {}, folder).part(mapping, expected, path)


def neutral(default: Any, **field: Any) -> Any:
    """A field added to a part that existed before it, whose default leaves the part as it was.

    It is left out of a recipe's hash while it has its default, so that hashes written down before the field existed
    still name the same computation. Keywords are those of `attrs.field`.
    """
    return attrs.field(default=default, metadata={_NEUTRAL: True}, **field)


def to_mapping(part: Any, *, parts: Parts | None = None, typed: bool = True, hashed: bool = False) -> dict[str, Any]:
    """The inverse of `build`: plain data with every field of the part, defaults included.

    Args:
        part: an attrs instance.
        parts: the short names to use.
        typed: whether to say the `type`; not needed where only one class can be meant.
        hashed: leave out `neutral` fields that have their default.

    Raises:
        ConfigError: naming the field, for a value that has no place in a file.
    """
    cls = type(part)
    hints = _hints(cls)  # type: ignore[arg-type]
    mapping: dict[str, Any] = {"type": _name_of(cls, parts or {})} if typed else {}
    for key, field in _fields(cls).items():
        value = getattr(part, field.name)
        if hashed and field.metadata.get(_NEUTRAL) and value == field.default:
            continue
        try:
            mapping[key] = _plain(value, hints[field.name], parts or {}, hashed)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}.{key}: {error}") from None
    return mapping


def renamed_fields(cls: type) -> dict[str, str]:
    """What fields of a part were called before -> what they are called now.

    A class says so in `RENAMED`, and the class of a field in `ONCE_FLAT`: what its own fields were called when they
    still lay in the part that holds it.
    """
    renamed = dict(getattr(cls, "RENAMED", {}))
    for key, field in _fields(cls).items():
        for old, new in getattr(_hints(cls)[field.name], "ONCE_FLAT", {}).items():
            renamed.setdefault(old, f"{key}.{new}")
    return renamed


def renamed_paths(part: Any, path: str = "") -> dict[str, str]:
    """`renamed_fields` of a part and of every part inside it, with the path to each, former ones and today's."""
    paths: dict[str, str] = {}
    if attrs.has(type(part)):
        paths = {f"{path}{old}": f"{path}{new}" for old, new in renamed_fields(type(part)).items()}
        inside = {key: getattr(part, field.name) for key, field in _fields(type(part)).items()}
    else:
        inside = dict(part) if isinstance(part, Mapping) else {str(i): item for i, item in enumerate(part)}
    for key, value in inside.items():
        if attrs.has(type(value)) or isinstance(value, Mapping | list | tuple):
            paths |= renamed_paths(value, f"{path}{key}.")
    return paths


def recipe_hash(mapping: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a resolved recipe, without what cannot change its results (`_IN_NO_HASH`).

    A part from a single file counts with the content of that file, so the hash is the same on every machine and moves
    when the code does.
    """
    text = json.dumps(pin_files(_hashed(mapping, ())), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _hashed(mapping: Mapping[str, Any], above: tuple[str, ...]) -> dict[str, Any]:
    """The fields that count."""
    return {
        key: _hashed(value, (*above, key)) if isinstance(value, Mapping) else value
        for key, value in mapping.items()
        if (*above, key) not in _IN_NO_HASH
    }


# -------------------------------------------------------------------------------------------------------- building


@attrs.frozen
class _Builder:
    parts: Parts
    folder: Path | None

    def part(self, mapping: Any, expected: type[Part], path: str) -> Part:
        if isinstance(mapping, str) and (_is_abstract(expected) or self.known(expected)):
            mapping = {"type": mapping}
        if not isinstance(mapping, Mapping):
            raise mismatch(path, mapping, describe(expected))
        given = dict(mapping)
        cls = self.resolve(given.pop("type", None), expected, path)
        fields = _fields(cls)
        dot = f"{path}." if path else ""
        unknown = [key for key in given if key not in fields]
        if unknown:
            renamed = renamed_fields(cls)
            lines = [
                f"{dot}{key}: {cls.__name__} has no such field"
                + (f": it is called {renamed[key]!r} now." if key in renamed else did_you_mean(str(key), fields))
                for key in unknown
            ]
            raise ConfigError("\n".join([*lines, f"{cls.__name__} has: {', '.join(fields) or 'no fields'}."]))
        hints = _hints(cls)
        values: dict[str, Any] = {}
        for key, field in fields.items():
            expects = describe(hints[field.name], field.validator)
            if key in given:
                values[key] = self.value(given[key], hints[field.name], f"{dot}{key}", expects)
            elif field.default is attrs.NOTHING:
                raise ConfigError(f"{dot}{key}: {cls.__name__} needs a value here: {expects}.")
        try:
            return typing.cast(Part, cls(**values))
        except (ValueError, TypeError) as error:
            raise ConfigError(diagnose(cls, values, hints, path, error)) from error

    def known(self, expected: type) -> Mapping[str, str]:
        """The short names of the parts that `expected` may stand for."""
        return self.parts.get(expected.__name__, {})

    def resolve(self, name: Any, expected: type, path: str) -> type:
        known = self.known(expected)
        at = f"{path}.type" if path else "type"
        if name is None:
            if not _is_abstract(expected):
                return expected
            raise ConfigError(f"{at}: say which {expected.__name__} is meant. Known: {_listed(known)}")
        if not isinstance(name, str):
            raise mismatch(at, name, "the name of a part")
        everything = {short: reference for table in self.parts.values() for short, reference in table.items()}
        reference = name if is_reference(name) else (known or everything).get(name)
        if reference is None:
            kind = next((kind for kind, table in self.parts.items() if name in table), None)
            if kind:
                raise ConfigError(
                    f"{at}: {name} is of kind {kind}, expected {expected.__name__}. Known: {_listed(known)}"
                )
            raise ConfigError(
                f"{at}: unknown {expected.__name__} {name!r}{did_you_mean(name, known or everything)} "
                f"Known: {_listed(known or everything)}"
            )
        try:
            cls = load_object(reference, folder=self.folder)
        except ConfigError as error:
            raise ConfigError(f"{at}: {error}") from error
        if not (isinstance(cls, type) and issubclass(cls, expected)):
            raise ConfigError(f"{at}: {name} is not a subclass of {expected.__module__}.{expected.__qualname__}.")
        if not attrs.has(cls) or inspect.isabstract(cls):
            raise ConfigError(f"{at}: {name} must be a concrete class decorated with @attrs.frozen(kw_only=True).")
        return cls

    def value(self, value: Any, hint: Any, path: str, expects: str) -> Any:
        origin, args = get_origin(hint), get_args(hint)
        if origin is typing.Annotated:
            return self.value(value, args[0], path, expects)
        if origin in (Union, UnionType):
            return self.union(value, args, path, expects)
        if hint is float and type(value) is int:
            value = float(value) if abs(value) <= _EXACT else math.inf
        if hint is float and type(value) is float and not math.isfinite(value):
            raise ConfigError(f"{path}: got {value!r}, expected {expects}: a finite number.")
        if hint is int and type(value) is int and abs(value) > _LARGEST:
            raise ConfigError(f"{path}: got a number of {len(str(abs(value)))} digits, expected {expects}.")
        if hint is float and type(value) is float:
            return value
        if hint is Path and isinstance(value, str):
            return Path(value)
        if accepts(hint, value):
            return value
        kind = origin or hint
        if kind in _SEQUENCES and isinstance(value, list | tuple):
            return _SEQUENCES[kind](self.items(value, args, path, expects))
        if kind in _MAPPINGS and isinstance(value, Mapping):
            keys, values = args or (Any, Any)
            return {
                self.value(k, keys, path, f"keys: {describe(keys)}"): self.value(
                    v, values, f"{path}.{k}", describe(values)
                )
                for k, v in value.items()
            }
        if _is_part(hint) and isinstance(value, str | Mapping):
            return self.part(value, hint, path)
        near = did_you_mean(value, [str(a) for a in args]) if origin is Literal and isinstance(value, str) else ""
        raise mismatch(path, value, expects + near.rstrip("."))

    def items(self, value: list[Any] | tuple[Any, ...], args: tuple[Any, ...], path: str, expects: str) -> list[Any]:
        hints = list(args) or [Any, ...]
        if len(hints) == 1 or hints[-1] is ...:
            hints = [hints[0]] * len(value)
        if len(hints) != len(value):
            raise mismatch(path, value, expects)
        pairs = enumerate(zip(value, hints, strict=True))
        return [self.value(item, hint, f"{path}[{i}]", describe(hint)) for i, (item, hint) in pairs]

    def union(self, value: Any, options: tuple[Any, ...], path: str, expects: str) -> Any:
        exact_first = sorted(options, key=lambda option: not accepts(option, value))
        nested = []
        for option in exact_first:
            try:
                return self.value(value, option, path, expects)
            except ConfigError as error:
                if str(error) != str(mismatch(path, value, expects)):
                    nested.append(error)
        raise nested[0] if len(nested) == 1 else mismatch(path, value, expects)


def _is_part(hint: Any) -> bool:
    return hint is object or isinstance(hint, ABCMeta) or (isinstance(hint, type) and attrs.has(hint))


def _is_abstract(cls: type) -> bool:
    return inspect.isabstract(cls) or not attrs.has(cls)


def _fields(cls: type) -> dict[str, attrs.Attribute[Any]]:
    fields = {field.alias or field.name: field for field in attrs.fields(cls) if field.init}
    assert "type" not in fields, f"{cls.__name__}: a part cannot have a field called 'type'"
    return fields


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError as error:
        raise ConfigError(
            f"{cls.__module__}.{cls.__qualname__}: {error}. The annotations of a part are read when it is built, so "
            "what they name must be imported at module level."
        ) from error


def _listed(names: Mapping[str, str]) -> str:
    return ", ".join(sorted(names)) + ("; " if names else "") + "or module:Class, or file.py:Class."


# --------------------------------------------------------------------------------------------------------- writing


def _name_of(cls: type, parts: Parts) -> str:
    for table in parts.values():
        for short, reference in table.items():
            if reference.rpartition(":")[2] == cls.__qualname__ and load_object(reference) is cls:
                return short
    return reference_to(cls)


def _in_table(cls: type, parts: Parts) -> bool:
    return not is_reference(_name_of(cls, parts))


def _plain(value: Any, hint: Any, parts: Parts, hashed: bool) -> Any:
    if isinstance(value, bool | str | NoneType) or type(value) is float:
        return value
    if type(value) is int:
        return float(value) if accepts(hint, 0.0) and not accepts(hint, value) else value
    if isinstance(value, Path):
        return str(value)
    if attrs.has(type(value)):
        typed = hint is not type(value) or _in_table(type(value), parts)
        return to_mapping(value, parts=parts, typed=typed, hashed=hashed)
    inner = _inner_hints(hint, value)
    if isinstance(value, frozenset | set):
        return sorted(_plain(item, inner[0], parts, hashed) for item in value)
    if isinstance(value, list | tuple):
        hints = inner if len(inner) == len(value) else [inner[0]] * len(value)
        return [_plain(item, item_hint, parts, hashed) for item, item_hint in zip(value, hints, strict=True)]
    if isinstance(value, Mapping):
        return {key: _plain(item, inner[-1], parts, hashed) for key, item in value.items()}
    raise TypeError(f"a value of type {type(value).__name__} cannot be written to a recipe.")


def _inner_hints(hint: Any, value: Any) -> list[Any]:
    """The hints of a container's items, seen through Optional and unions."""
    for option in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        origin = get_origin(option)
        if isinstance(origin, type) and isinstance(value, origin):
            return [arg for arg in get_args(option) if arg is not ...] or [Any]
    return [Any]
