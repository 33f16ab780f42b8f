"""A part from what a user types: a name, a file, a few fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from rlt2i.config.build import Parts, build
from rlt2i.config.references import ConfigError, parse_yaml, read_yaml
from rlt2i.inputs.textfiles import has_suffix, user_path

Part = TypeVar("Part")


def named_part(
    expected: type[Part], name: str, fields: Sequence[str] = (), *, key: str, parts: Parts | None = None
) -> Part:
    """The part that a name and some fields describe.

    Args:
        expected: its abstract class.
        name: a short name, `module:Class`, `file.py:Class`, or a YAML file with the part or with a whole recipe.
        fields: `field=value`, or `field.subfield=value`; values are YAML.
        key: under which a recipe holds it.
        parts: the short names.

    Raises:
        ConfigError: naming what is wrong.
    """
    folder = None
    mapping: dict[str, Any] = {"type": name}
    if has_suffix(name, ".yaml", ".yml"):
        if not user_path(name).is_file():
            raise ConfigError(f"{name}: no such file.")
        mapping = read_yaml(user_path(name))
        folder = user_path(name).parent
        node = mapping.get(key, mapping) if "policy" in mapping else mapping
        mapping = {"type": node} if isinstance(node, str) else dict(node)
    for field in fields:
        path, equals, text = field.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {field}: write field=value, for example match=partial.")
        *parents, last = path.split(".")
        target = mapping
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {field}: {parent!r} is a value and has no fields.")
        target[last] = parse_yaml(text)
    return build(expected, mapping, path=key, parts=parts, folder=folder)
