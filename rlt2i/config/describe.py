"""What a field of a part accepts, in words: "float in [0, 1]", "'group' or 'global'", "a list of Allocation parts"."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from rlt2i.config.references import ConfigError

_WORDS = {
    float: "float",
    int: "int",
    str: "str",
    bool: "true or false",
    NoneType: "null",
    Any: "any value",
    Path: "a path",
}
_LONGEST, _FEW = 200, 8
_YAML_NAMES = {"NoneType": "null", "dict": "mapping"}
_LISTS = (tuple, list, frozenset, set, typing.get_origin(typing.Sequence))


def mismatch(path: str, value: Any, expects: str) -> ConfigError:
    """The error of a value that is not what its field expects."""
    name = type(value).__name__
    quotes = "; put it in quotes" if expects.startswith("str") and isinstance(value, bool | int | float) else ""
    return ConfigError(
        f"{path or 'recipe'}: got {shown(value)} ({_YAML_NAMES.get(name, name)}), expected {expects}{quotes}"
    )


def shown(value: Any) -> str:
    """A value as a message shows it: at most a line, however large it is."""
    if isinstance(value, int) and abs(value) >= 10**_LONGEST:
        return f"a number of more than {_LONGEST} digits"
    if isinstance(value, str):
        value = value[: _LONGEST + 1]
    elif isinstance(value, list | tuple):
        value = type(value)(shown(item) if isinstance(item, list | dict | str) else item for item in value[:_FEW])
    elif isinstance(value, dict):
        value = {key: shown(item) for key, item in itertools.islice(value.items(), _FEW)}
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def accepts(hint: Any, value: Any) -> bool:
    """Whether a plain value already has the annotated type; True is no int, and 1 is no float."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(accepts(option, value) for option in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    return hint is Any or (hint in (float, int, str, bool, NoneType) and type(value) is hint)


def describe(hint: Any, validator: Any = None) -> str:
    """The annotation and the range that the validator adds, as a reader of the recipe would say it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return describe(args[0], validator)
    if origin in (Union, UnionType):
        return " or ".join(describe(option, validator) for option in args)
    if origin is Literal:
        return " or ".join(repr(option) for option in args)
    if hint in _WORDS:
        return _WORDS[hint] + (_range(validator) if hint in (float, int, str) else "")
    kind = origin or hint
    if kind in _LISTS:
        if kind is tuple and args and args[-1] is not ...:
            return f"[{', '.join(map(describe, args))}]"
        return f"a list of {describe(args[0])}" if args else "a list"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return f"a mapping from {describe(args[0])} to {describe(args[1])}" if args else "a mapping"
    return f"{getattr(hint, '__name__', hint)} ({{type: ..., field: value}})"


def diagnose(cls: type, values: dict[str, Any], hints: Mapping[str, Any], path: str, error: Exception) -> str:
    """Names the field whose validator refused its value; the part as a whole when no single field is to blame."""
    try:
        with attrs.validators.disabled():
            part = cls(**values)
    except (ValueError, TypeError):
        return f"{path or cls.__name__}: {_words(error)}"
    for field in attrs.fields(cls):
        value = getattr(part, field.name)
        try:
            if field.validator is not None:
                field.validator(part, field, value)
        except (ValueError, TypeError) as refusal:
            at = f"{path}.{field.alias}" if path else field.alias
            if _range(field.validator):
                return str(mismatch(at, value, describe(hints[field.name], field.validator)))
            return f"{at}: {_words(refusal)}"
    return f"{path or cls.__name__}: {_words(error)}"


def _words(error: Exception) -> str:
    """The message alone; attrs' validators append the field and its value as further arguments."""
    return str(error.args[0]) if error.args else str(error)


def _leaves(validator: Any) -> Iterator[Any]:
    """The validators inside attrs' own combinators."""
    inner = getattr(validator, "_validators", None) or getattr(validator, "validator", None)
    if isinstance(inner, tuple | list):
        for item in inner:
            yield from _leaves(item)
    elif inner is not None:
        yield from _leaves(inner)
    elif validator is not None:
        yield validator


def _range(validator: Any) -> str:
    """' in [0, 1]', ' >= 1' or ' of {'a', 'b'}' when attrs' own validators say all there is to say, else nothing."""
    leaves = list(_leaves(validator))
    bounds = {getattr(leaf, "compare_op", None): getattr(leaf, "bound", None) for leaf in leaves}
    if len(leaves) == 1 and hasattr(leaves[0], "options"):
        return f" of {{{', '.join(map(repr, leaves[0].options))}}}"
    if not bounds or None in bounds:
        return ""
    low = next((op for op in (">=", ">") if op in bounds), None)
    high = next((op for op in ("<=", "<") if op in bounds), None)
    if low and high:
        left, right = ("[" if low == ">=" else "("), ("]" if high == "<=" else ")")
        return f" in {left}{bounds[low]:g}, {bounds[high]:g}{right}"
    only = low or high
    return f" {only} {bounds[only]:g}" if only else ""
