"""Why scores are invalid, counted; and one answer on all processes, although the reward of one of them has failed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.config.secrets import redacted_text
from rlt2i.interfaces import RewardOutput
from rlt2i.rewards.batching import REASON

Gather = Callable[[Tensor], Tensor]
"""Concatenates [N, ...] tensors of all processes; N is the same on all of them."""

SAID = 20
"""Reasons that a process tells the others, the most frequent first."""
NOTE = 200
"""Characters of what a reward told of one image."""
SHOWN = 3
"""Reasons in a message."""


@attrs.define
class FailureCounts:
    """How many images a reward was shown, and why it could not judge some of them.

    Attributes:
        images: shown.
        reasons: reason -> images.
    """

    images: int = 0
    reasons: Counter[str] = attrs.field(factory=Counter)

    @property
    def invalid(self) -> int:
        """Images that were not judged."""
        return self.reasons.total()

    @property
    def share(self) -> float:
        """Of the images, those that were not judged."""
        return self.invalid / self.images if self.images else 0.0

    @classmethod
    def of(cls, output: RewardOutput) -> FailureCounts:
        """The count of a single answer."""
        tally = cls()
        tally.add(output)
        return tally

    @classmethod
    def sum_of(cls, tallies: Iterable[FailureCounts]) -> FailureCounts:
        """Of several batches."""
        whole = cls()
        for tally in tallies:
            whole.images += tally.images
            whole.reasons.update(tally.reasons)
        return whole

    def add(self, output: RewardOutput) -> None:
        """Count one answer of the reward."""
        valid = output.valid.tolist()
        self.images += len(valid)
        info = output.info or [{} for _ in valid]
        self.reasons.update(
            redacted_text(str(details.get(REASON, "no reason given")))
            for ok, details in zip(valid, info, strict=True)
            if not ok
        )

    def together(self, gather: Gather, device: torch.device | str = "cpu") -> FailureCounts:
        """The sum over all processes, on each of them."""
        own = {"images": self.images, "invalid": self.invalid, "reasons": dict(self.reasons.most_common(SAID))}
        whole = FailureCounts()
        for text in all_gather_text(json.dumps(own), gather, device):
            reported = json.loads(text)
            whole.images += reported["images"]
            whole.reasons.update(reported["reasons"])
            rest = reported["invalid"] - sum(reported["reasons"].values())
            if rest:
                whole.reasons["other reasons"] += rest
        return whole

    def __str__(self) -> str:
        """The most frequent reasons with their numbers."""
        shown = [f"{count} x {reason}" for reason, count in self.reasons.most_common(SHOWN)]
        more = len(self.reasons) - len(shown)
        return "; ".join([*shown, *([f"and {more} other reasons"] if more else [])])


def note(details: Mapping[str, Any]) -> str:
    """What a reward told of one image, in one line of at most `NOTE` characters: "seen: red circle, blue square"."""
    parts = []
    for key, value in details.items():
        if isinstance(value, Mapping):
            parts.append(f"{key}: {note(value)}")
        else:
            reported = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            parts.append(f"{key}: {reported or 'nothing'}")
    line = " ".join("; ".join(parts).split())
    return line if len(line) <= NOTE else f"{line[: NOTE - 1]}…"


def all_gather_notes(output: RewardOutput, gather: Gather, device: torch.device | str = "cpu") -> list[str]:
    """What the reward told of every image, of all processes in the order of ranks; "" where it told nothing."""
    own = [note(details) for details in output.info] if output.info else [""] * len(output.valid)
    return [line for text in all_gather_text(json.dumps(own), gather, device) for line in json.loads(text)]


def all_gather_text(text: str, gather: Gather, device: torch.device | str = "cpu") -> list[str]:
    """One text per process, in the order of ranks, on all processes. They travel as bytes in tensors."""
    raw = text.encode()
    lengths = gather(torch.tensor([len(raw)], device=device)).tolist()
    row = torch.zeros(1, max(1, *lengths), dtype=torch.uint8)
    row[0, : len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
    rows = gather(row.to(device)).cpu().tolist()
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def with_same_components(
    components: Mapping[str, Tensor], count: int, gather: Gather, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Every component that some process has, in one order; nan where this process has none.

    A reward that failed for all images of a process names no components there. What follows (means over processes,
    advantages of components) waits for every process, so the names must be the same.

    Args:
        components: name -> [count], of this process.
    """
    reported = all_gather_text(json.dumps(list(components)), gather, device)
    names = dict.fromkeys(name for text in reported for name in json.loads(text))
    absent = torch.full((count,), torch.nan)
    return {name: components.get(name, absent) for name in names}
