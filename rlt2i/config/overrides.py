"""`--set credit.mix=0.7`: change single fields of a resolved recipe."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlt2i.config.references import ConfigError, did_you_mean, parse_yaml

Keys = tuple[str | int, ...]


class _Fresh(dict[str, Any]):
    """A part that an override put in place: its defaults are not spelt out, so any field may be set."""


def apply_overrides(
    mapping: Mapping[str, Any], overrides: Sequence[str], *, renamed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A copy of a resolved recipe with some fields changed.

    `credit.allocations.0.mix=1` (or `allocations[0]`) names a field exactly. `credit.mix=0.7` is a shorthand,
    good when exactly one field called `mix` exists anywhere under `credit`. Values are YAML. Setting a part, or its
    `type`, replaces the whole part: the other fields take the defaults of the new one.

    Args:
        mapping: a resolved recipe.
        overrides: `section.field=value`.
        renamed: former path of a field -> today's, for the message that refuses the former.

    Raises:
        ConfigError: on a malformed override, or a path that names nothing or more than one thing.
    """
    result = copy.deepcopy(dict(mapping))
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {override}: write section.field=value, for example train.seed=1.")
        value = _value(text, override)
        *parents, last = _locate(result, _split(name.strip()), override, renamed or {})
        if last == "type" and parents:
            value = {"type": value}
            *parents, last = parents
        _assign(result, (*parents, last), _Fresh(value) if isinstance(value, dict) else value)
    return result


def _value(text: str, override: str) -> Any:
    """The value of an override: YAML as people type it on a command line.

    A `#` is part of the value, where a YAML file would begin a comment, and a blank may be missing after the colon of
    `{type:ODE}`.
    """
    plain = text.strip()
    try:
        if "#" in plain and plain[:1] not in "\"'[{":
            value = parse_yaml("'" + plain.replace("'", "''") + "'")
        else:
            value = parse_yaml(text)
    except ConfigError as error:
        hint = " Put a text with # into quotes." if "#" in text else ""
        raise ConfigError(f"--set {override}: {error}{hint}") from None
    return _with_blanks(value)


def _with_blanks(value: Any) -> Any:
    """{"type:ODE": None}, which YAML makes of {type:ODE}, as {"type": "ODE"}; everything else as it is."""
    if isinstance(value, list):
        return [_with_blanks(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {}
    for key, item in value.items():
        field, colon, text = key.partition(":") if isinstance(key, str) else (key, "", "")
        missing = item is None and colon and text and field.isidentifier()
        result[field if missing else key] = parse_yaml(text) if missing else _with_blanks(item)
    return result


def _split(name: str) -> list[str]:
    return [word for word in re.sub(r"\[(\d+)\]", r".\1", name).split(".") if word]


def _locate(root: dict[str, Any], words: list[str], override: str, renamed: Mapping[str, str]) -> Keys:
    """The keys of the field that the words name: exactly, or else as the only match under their first word."""
    section, rest = words[0], words[1:]
    if section not in root:
        _refuse_former(words, override, renamed)
        elsewhere = [_dotted(path) for path in _matches(root, words, ())]
        hint = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(section, root)
        raise ConfigError(f"--set {override}: a recipe has no {section!r}{hint} It has: {', '.join(root)}.")
    exact = _follow(root, words)
    if exact is not None:
        return exact
    matches = list(_matches(root[section], rest, (section,)))
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"--set {override}: several fields match, name one: {', '.join(map(_dotted, matches))}.")
    _refuse_former(words, override, renamed)
    fields = [_dotted(path) for path in _every_field(root[section], (section,))]
    near = did_you_mean(words[-1], {path.rpartition(".")[2] for path in fields})
    raise ConfigError(f"--set {override}: there is no such field{near} Known: {', '.join(fields)}.")


def _refuse_former(words: list[str], override: str, renamed: Mapping[str, str]) -> None:
    """Raise where the words are a former name: a whole path, its last field, or that within the section named first."""
    section, rest = words[0], words[1:] or words
    news = {
        new
        for old, new in renamed.items()
        if _ends(old.split("."), rest) and (not words[1:] or old.split(".")[0] == section)
    }
    if news:
        raise ConfigError(f"--set {override}: this field is called {' or '.join(sorted(news))} now.")


def _ends(path: list[str], words: list[str]) -> bool:
    return path[-len(words) :] == words


def _follow(node: Any, words: list[str]) -> Keys | None:
    """The keys along an exact path; the last may be new in a free mapping, as a `type`, or at the end of a list."""
    keys: list[str | int] = []
    for depth, word in enumerate(words):
        last = depth == len(words) - 1
        if isinstance(node, dict) and (word in node or (last and _may_add(node, depth))):
            keys.append(word)
            node = node.get(word)
        elif isinstance(node, list) and word.isdigit() and (int(word) < len(node) or (last and int(word) == len(node))):
            keys.append(int(word))
            node = node[int(word)] if int(word) < len(node) else None
        elif last and word == "type" and isinstance(node, str | None) and keys:
            keys.append(word)
        else:
            return None
    return tuple(keys)


def _may_add(node: dict[str, Any], depth: int) -> bool:
    return isinstance(node, _Fresh) or (depth > 1 and "type" not in node)


def _children(node: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from enumerate(node)


def _matches(node: Any, words: list[str], prefix: Keys) -> Iterator[Keys]:
    """Every place under `node`, itself excluded, from which the words lead to an existing field."""
    for key, child in _children(node):
        value: Any = child
        for word in words:
            if isinstance(value, dict) and word in value:
                value = value[word]
            elif isinstance(value, list) and word.isdigit() and int(word) < len(value):
                value = value[int(word)]
            else:
                break
        else:
            if words:
                yield (*prefix, key, *(int(word) if word.isdigit() else word for word in words))
        yield from _matches(child, words, (*prefix, key))


def _every_field(node: Any, prefix: Keys) -> Iterator[Keys]:
    for key, child in _children(node):
        if isinstance(child, dict) or (isinstance(child, list) and any(isinstance(item, dict) for item in child)):
            yield from _every_field(child, (*prefix, key))
        else:
            yield (*prefix, key)


def _assign(root: Any, keys: Keys, value: Any) -> None:
    node = root
    for key in keys[:-1]:
        node = node[key]
    if isinstance(node, list) and keys[-1] == len(node):
        node.append(value)
    else:
        node[keys[-1]] = value


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))
