"""A reward from what a user types: a name, a file, a few fields."""

from __future__ import annotations

from collections.abc import Sequence

from rlt2i.config import Parts
from rlt2i.config.naming import named_part
from rlt2i.interfaces import Reward


def named_reward(name: str, fields: Sequence[str] = (), *, parts: Parts | None = None) -> Reward:
    """The reward that a name and some fields describe; arguments as of `named_part`.

    Raises:
        ConfigError: naming what is wrong.
    """
    return named_part(Reward, name, fields, key="reward", parts=parts)  # type: ignore[type-abstract]
