"""From names and values to frozen parts: read strictly, checked early, written back as they were meant."""

from rlt2i.config.build import Parts, build, neutral, recipe_hash, renamed_paths, to_mapping
from rlt2i.config.overrides import apply_overrides
from rlt2i.config.references import ConfigError, dump_yaml, load_object, parse_yaml, read_yaml

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
    "renamed_paths",
    "to_mapping",
]
