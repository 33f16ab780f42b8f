"""Names in configuration files: YAML read strictly, and `module:attribute` references to anything importable."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Hashable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import yaml

from rlt2i.config.trust import TRUST, untrusted
from rlt2i.inputs.textfiles import TextFileError, read_text, refuse_surrogates, user_path


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and the way out."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' for the nearest known word, else a full stop."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else "."


# ------------------------------------------------------------------------------------------------------------ YAML


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: `1e-4` is a number, `yes` and `1:30` are words, a key may appear only once."""


class _StrictDumper(yaml.SafeDumper):
    """Quotes the words that `_StrictLoader` would take for something else."""


_PLAIN = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rsplit(":", 1)[1] in {"null", "merge"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[0-9][0-9_]*"
for _class in (_StrictLoader, _StrictDumper):
    _class.yaml_implicit_resolvers = {first: list(resolvers) for first, resolvers in _PLAIN.items()}
    for _tag, _pattern, _first in (
        ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
        ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
        (
            "float",
            rf"^[-+]?(?:{_NUMBER}\.[0-9_]*|\.[0-9]+|{_NUMBER}(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
            "-+0123456789.",
        ),
        ("float", r"^(?:[-+]?\.inf|\.nan)$", "-+."),
    ):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    observed: set[Hashable] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True) if key_node.tag != "tag:yaml.org,2002:merge" else None
        if key is not None and key in observed:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} appears twice; keep one.")
        observed.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def _whole_characters(loader: _StrictLoader, node: yaml.ScalarNode) -> str:
    r"""A text; two JSON escapes of one character ("\ud83d\ude00") are put together, half of one is refused."""
    value = str(loader.construct_scalar(node))
    joined = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    try:
        refuse_surrogates(joined, f"line {node.start_mark.line + 1}")
    except TextFileError as error:
        raise ConfigError(str(error)) from None
    return joined


_StrictLoader.add_constructor("tag:yaml.org,2002:str", _whole_characters)


def dump_yaml(value: Any) -> str:
    """The YAML text of plain data, such that `parse_yaml` returns the same."""
    return yaml.dump(value, Dumper=_StrictDumper, sort_keys=False, width=110)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text (JSON is YAML, too).

    Raises:
        ConfigError: when the text is not YAML, or a key appears twice.
    """
    if len(text) > _LONGEST:
        raise ConfigError(
            f"{len(text):,} characters, more than {_LONGEST:,}; no recipe is as long. Keep data in files."
        )
    try:
        _check_structure(text)
        return yaml.load(text, Loader=_StrictLoader)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from None
    except (TypeError, RecursionError):
        raise ConfigError("not a recipe: a key is no word, or the nesting never ends.") from None
    except ValueError:  # Python reads no whole number of more than some thousand digits
        raise ConfigError("not a recipe: a number has thousands of digits.") from None


_DEEPEST, _MOST_VALUES, _LONGEST = 40, 100_000, 200_000


@attrs.define(kw_only=True)
class _Open:
    """A mapping or a list that is being read: its values so far, and whether a key comes next."""

    anchor: str = ""
    is_mapping: bool = False
    wants_key: bool = False
    values: int = 1


def _check_structure(text: str) -> None:
    """Refuse, before anything is built, what no recipe needs and what could fill the memory.

    Explicit tags (`!!bool maybe`) and keys that are lists or mappings have no meaning here; a value named by aliases
    again and again ("billion laughs") grows with every level.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[_Open] = [_Open()]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line, inside = event.start_mark.line + 1, open_nodes[-1]
        opens = isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent)
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            closed = open_nodes.pop()
            sizes[closed.anchor] = closed.values
            open_nodes[-1].values += closed.values
        elif opens or isinstance(event, yaml.ScalarEvent | yaml.AliasEvent):
            if getattr(event, "tag", None) not in (None, "!"):
                raise ConfigError(
                    f"line {line}: the tag {event.tag!r} means nothing in a recipe; write the value alone."
                )
            if opens and inside.wants_key:
                raise ConfigError(f"line {line}: a key must be a word, not a list or a mapping.")
            if inside.is_mapping:
                inside.wants_key = not inside.wants_key
            if opens:
                is_mapping = isinstance(event, yaml.MappingStartEvent)
                open_nodes.append(_Open(anchor=event.anchor or "", is_mapping=is_mapping, wants_key=is_mapping))
            elif isinstance(event, yaml.ScalarEvent):
                inside.values += 1
                sizes[event.anchor or ""] = 1
            elif event.anchor in sizes:
                inside.values += sizes[event.anchor]
            else:
                raise ConfigError(f"line {line}: *{event.anchor} names nothing that is complete before it.")
        if len(open_nodes) > _DEEPEST:
            raise ConfigError(f"line {line}: nested deeper than {_DEEPEST} levels; no recipe is.")
        if open_nodes[-1].values > _MOST_VALUES:
            raise ConfigError(f"line {line}: more than {_MOST_VALUES} values with aliases written out; no recipe has.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: naming the file.
    """
    try:
        value = parse_yaml(read_text(path))
    except TextFileError as error:
        raise ConfigError(str(error)) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, got {type(value).__name__}.")
    return value


# ------------------------------------------------------------------------------------------------------ references


def is_reference(name: str) -> bool:
    """Whether a name is spelt `module:attribute` or `file.py:attribute`."""
    module, colon, attribute = name.rpartition(":")
    return bool(colon and module) and all(part.isidentifier() for part in attribute.split("."))


def load_object(reference: str, *, folder: Path | None = None) -> Any:
    """Import `module:attribute`, or `file.py:attribute` relative to the working directory or to `folder`.

    Raises:
        ConfigError: when the module, the file or the attribute does not exist, or a run directory names code that was
            never run here (`rlt2i.config.trust`).
        ModuleNotFoundError: when it exists and needs a package that is not installed.
    """
    name, _, attribute = reference.rpartition(":")
    module = _load_file(name, folder) if name.endswith(".py") else _import(name, reference)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [word for word in vars(value) if not word.startswith("_")]
            raise ConfigError(f"{reference}: {name} has no {part!r}{did_you_mean(part, public)}")
        value = getattr(value, part)
    return value


def reference_to(value: Any) -> str:
    """The reference under which `load_object` finds a class or function again."""
    module = sys.modules.get(value.__module__)
    path = getattr(module, "__rlt2i_file__", None)
    return f"{path or value.__module__}:{value.__qualname__}"


def pin_files(value: Any) -> Any:
    """A copy in which `type: folder/file.py:Name` becomes `file.py:Name@<sha256>`: the same on every machine."""
    if isinstance(value, dict):
        return {
            key: _pin(item) if key == "type" and isinstance(item, str) else pin_files(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [pin_files(item) for item in value]
    return value


def _pin(reference: str) -> str:
    name, _, attribute = reference.rpartition(":")
    path = Path(name).expanduser()
    if not name.endswith(".py") or not path.is_file():
        return reference
    return f"{path.name}:{attribute}@{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _refuse_untrusted(reference: str, file: Path | None) -> None:
    if refused := untrusted(reference.rpartition(":")[0], file):
        folder, code = refused
        raise ConfigError(
            f"{reference}: named by {folder}, and its code was never run here, so {code} is not executed. Look at it, "
            f"then say --trust-code (or {TRUST}=1); a recipe file that you name yourself is trusted."
        )


def _import(name: str, reference: str) -> ModuleType:
    _refuse_untrusted(reference, None)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name != missing and not name.startswith(missing + "."):
            raise  # the module is there, and something that it needs is not
        raise ConfigError(
            f"{reference}: there is no module {missing!r} on the path. Write my_package.my_module:MyPart for an "
            "installed or local package, or path/to/my_file.py:MyPart for a single file."
        ) from error


def _load_file(name: str, folder: Path | None) -> ModuleType:
    places = [user_path(name), *([folder / name] if folder else [])]
    path = next((place.resolve() for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(
            f"{name}: no such file (looked for {' and '.join(str(place.absolute()) for place in places)})."
        )
    module_name = f"rlt2i_file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    _refuse_untrusted(f"{name}:", path)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__rlt2i_file__"] = str(path)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
