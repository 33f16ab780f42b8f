"""From names and values to frozen parts: read strictly, checked early, written back as they were meant."""

from rlt2i.config.build import (
    ConfigError,
    Parts,
    apply_overrides,
    build,
    dump_yaml,
    load_object,
    neutral,
    parse_yaml,
    read_yaml,
    recipe_hash,
    to_mapping,
)

__all__ = [
    "ConfigError",
    "Parts",
    "apply_overrides",
    "build",
    "dump_yaml",
    "load_object",
    "neutral",
    "parse_yaml",
    "read_yaml",
    "recipe_hash",
    "to_mapping",
]
