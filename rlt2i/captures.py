"""Names of what a policy can record while it denoises.

An attention map is called `attention/{direction}/{blocks}`. The direction is `image_to_text` (image queries, text
keys) or `text_to_image`; the blocks are `middle` (the middle third), `all`, one index such as `7`, or an inclusive
range such as `8-15`.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

Direction = Literal["image_to_text", "text_to_image"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

AUTO = "auto"
"""Stands for a direction or block that is still to be chosen by measurement (`rlt2i.evaluation.auto`)."""

PREFERENCE = "preference"
"""Capture [B, T] of samplers that read pairs: +1 for the winner of a pair, -1 for its loser, at every step."""

EDGES = "edges"
"""Capture [B, T] long of samplers whose rollouts share steps: which noisy step a rollout takes. Rollouts of a group
with equal numbers at a step take it together; -1 where a rollout draws no noise."""

NEGATIVE = "negative_velocity"
"""Capture [B, T, C, H, W] of guided policies: the velocity of the negative prompt, 0 where a step is not guided."""

_BLOCKS = re.compile(r"middle|all|\d+|(\d+)-(\d+)")


def attention_name(direction: Direction, blocks: str | int = "middle") -> str:
    """The capture name of an attention map, after checking both parts.

    Raises:
        ValueError: when a part is unknown.
    """
    blocks = str(blocks)
    if direction not in DIRECTIONS:
        raise ValueError(f"attention_name(direction={direction!r}): use one of {', '.join(DIRECTIONS)}.")
    match = _BLOCKS.fullmatch(blocks)
    if match is None or (match[1] is not None and int(match[1]) >= int(match[2])):
        raise ValueError(
            f"attention_name(blocks={blocks!r}): use 'middle', 'all', one block such as '7', or a range such as '8-15'."
        )
    return f"attention/{direction}/{blocks}"


def parse_attention_name(name: str) -> tuple[Direction, str]:
    """(direction, blocks) of a capture name; the inverse of `attention_name`.

    Raises:
        ValueError: when the name is not that of an attention map.
    """
    kind, _, rest = name.partition("/")
    direction, _, blocks = rest.partition("/")
    if kind != "attention":
        raise ValueError(
            f"{name!r} is not the name of an attention map; build one with attention_name(direction, blocks)."
        )
    attention_name(direction, blocks)  # type: ignore[arg-type]
    return direction, blocks  # type: ignore[return-value]


def select_blocks(blocks: str, num_blocks: int) -> tuple[int, ...]:
    """The block indices that a `blocks` selector means in a network of `num_blocks`.

    Raises:
        ValueError: when the network has no such block.
    """
    if blocks == "all":
        return tuple(range(num_blocks))
    if blocks == "middle":
        return tuple(range(num_blocks // 3, num_blocks - num_blocks // 3))
    first, _, last = blocks.partition("-")
    chosen = tuple(range(int(first), int(last or first) + 1))
    if chosen[-1] >= num_blocks:
        raise ValueError(f"blocks={blocks!r}: the network has blocks 0 to {num_blocks - 1}.")
    return chosen


def attention_names(num_blocks: int) -> frozenset[str]:
    """Every attention map that a network of `num_blocks` joint-attention blocks can record."""
    ranges = [f"{i}-{j}" for i in range(num_blocks) for j in range(i + 1, num_blocks)]
    selectors = ["middle", "all", *map(str, range(num_blocks)), *ranges]
    return frozenset(attention_name(direction, blocks) for direction in DIRECTIONS for blocks in selectors)
