"""What a probe measured: means over batches with their errors, and the table of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import torch
from safetensors import safe_open
from torch import Tensor

from rlt2i.bench.gradients import jackknife_error
from rlt2i.runs.files import replace_tensors


@attrs.frozen(kw_only=True)
class Measured:
    """One number.

    Attributes:
        weights: "base", or the name of a checkpoint.
        credit, measure: which.
        value, error: mean and standard error over batches.
        batches: how many.
    """

    weights: str
    credit: str
    measure: str
    value: float
    error: float
    batches: int


@attrs.define
class Tally:
    """Values by (credit, measure), one per batch."""

    values: dict[tuple[str, str], list[float]] = attrs.field(factory=dict)

    def add(self, credit: str, measure: str, value: Tensor) -> None:
        """The mean of what is not nan; nothing where all is."""
        known = value[~value.isnan()]
        if known.numel():
            self.values.setdefault((credit, measure), []).append(float(known.double().mean()))

    def merge(self, batch: Tally) -> None:
        """Append what one batch gave."""
        for key, values in batch.values.items():
            self.values.setdefault(key, []).extend(values)

    def rows(self, weights: str) -> Iterator[Measured]:
        """Means and standard errors over batches."""
        for (credit, measure), values in self.values.items():
            n, v = len(values), torch.tensor(values, dtype=torch.float64)
            error = float(jackknife_error((v.sum() - v) / (n - 1))) if n > 1 else float("nan")
            yield Measured(
                weights=weights, credit=credit, measure=measure, value=float(v.mean()), error=error, batches=n
            )


Saved = tuple[Tally, Mapping[str, Tensor]]
"""What one batch gave: its measures, and tensors by name."""


def write_batch(path: Path, tally: Tally, gradients: Mapping[str, Tensor]) -> None:
    """Keep what one batch gave, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [[credit, measure, values] for (credit, measure), values in tally.values.items()]
    replace_tensors(path, dict(gradients), metadata={"tally": json.dumps(rows)})


def read_batch(path: Path) -> Saved | None:
    """What `write_batch` kept; None where there is nothing."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        rows = json.loads(file.metadata()["tally"])
        gradients = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return Tally(values={(credit, measure): values for credit, measure, values in rows}), gradients


COLUMNS = ("weights", "credit", "measure", "value", "error", "batches")


def table(rows: Sequence[Measured]) -> str:
    """A line per measure, a column per credit."""
    lines = []
    for weights in dict.fromkeys(row.weights for row in rows):
        own = [row for row in rows if row.weights == weights]
        credits = list(dict.fromkeys(row.credit for row in own))
        lines.append(f"{weights:<44} " + " ".join(f"{credit:>16}" for credit in credits))
        for measure in dict.fromkeys(row.measure for row in own):
            by_credit = {row.credit: row for row in own if row.measure == measure}
            cells = (f"{by_credit[c].value:.3f} ± {by_credit[c].error:.3f}" if c in by_credit else "" for c in credits)
            lines.append(f"{measure:<44} " + " ".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)
