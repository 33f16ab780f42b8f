"""What a probe measured: means over batches with their errors, and the table of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

from rlt2i.bench.gradients import jackknife_error


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

    def rows(self, weights: str) -> Iterator[Measured]:
        """Means and standard errors over batches."""
        for (credit, measure), values in self.values.items():
            n, v = len(values), torch.tensor(values, dtype=torch.float64)
            error = float(jackknife_error((v.sum() - v) / (n - 1))) if n > 1 else float("nan")
            yield Measured(
                weights=weights, credit=credit, measure=measure, value=float(v.mean()), error=error, batches=n
            )


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
