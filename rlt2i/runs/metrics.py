"""The lines of metrics.jsonl: one parser for all who read them, one way to append them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

METRICS = "metrics.jsonl"
DROPPED = "metrics.dropped.jsonl"
FAILURES = "failures.jsonl"


def parse_metrics(text: str) -> list[tuple[str, dict[str, Any] | None]]:
    """The lines of a metrics file with their records; None where a line is damaged, or was cut short by a crash."""
    return [(line, _record(line)) for line in text.split("\n") if line]


def read_metrics(path: Path, phase: str = "train") -> list[dict[str, Any]]:
    """The sound lines of one phase of a run's metrics; needs no lock, so a live run can be read."""
    file = path / METRICS
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    return [record for _, record in parse_metrics(text) if record is not None and record["phase"] == phase]


def _record(line: str) -> dict[str, Any] | None:
    """A line of metrics, or None for one that a crash cut short."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) and isinstance(record["phase"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def append_lines(stream: TextIO, lines: Sequence[str]) -> None:
    """Append lines and have them on the disk before returning."""
    stream.write("".join(f"{line}\n" for line in lines))
    stream.flush()
    os.fsync(stream.fileno())
