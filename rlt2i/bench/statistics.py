"""Paired comparisons of arms with a reference: intervals, corrections, equivalence, power. Pure functions.

A difference is taken seed by seed: arms of one seed share prompts and noise, so what the seed adds to both cancels.
An interval over seeds says what another seed would give; prompts are resampled elsewhere (`rlt2i.evaluation`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import attrs
import numpy as np
from scipy import stats

Verdict = Literal["better", "worse", "equivalent", "not distinguishable"]

FEWEST_SEEDS = 3
"""Below it there is no verdict: scores come in steps of one image, and two differences may be the same by chance."""
MOST_SEEDS = 100_000
"""Beyond it `seeds_needed` gives up: no benchmark runs so many."""


@attrs.frozen(kw_only=True)
class Paired:
    """The differences of one arm from the reference, over the seeds that both ran.

    Attributes:
        mean: of the differences.
        standard_error: of that mean over seeds; nan for fewer than two seeds.
        low, high: Student's t interval.
        p: of no difference, two-sided t test; 1 where all differences are exactly 0, nan for one seed.
        p_equivalent: of a difference of at least the margin, two one-sided t tests (Schuirmann 1987); nan for one
            seed, or without a margin.
        seeds: how many.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    p: float
    p_equivalent: float
    seeds: int


def paired(differences: Sequence[float], *, margin: float | None = None, confidence: float = 0.95) -> Paired:
    """Mean of paired differences with its t interval and the p values of difference and of equivalence.

    Args:
        differences: arm minus reference, one per seed; finite.
        margin: > 0, the smallest difference that would matter, in the unit of the differences; None where nobody said.
        confidence: of the interval.

    Raises:
        ValueError: on no differences, one that is not finite, or a margin that is not positive.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"paired: got {list(differences)}; give at least one difference, all finite.")
    if margin is not None and not margin > 0:
        raise ValueError(f"paired(margin={margin}): equivalence needs a smallest difference that matters, above 0.")
    n, mean = len(values), float(values.mean())
    if n < 2:
        unknown = dict.fromkeys(("standard_error", "low", "high", "p", "p_equivalent"), math.nan)
        return Paired(mean=mean, seeds=1, **unknown)
    error = float(values.std(ddof=1) / math.sqrt(n))
    reach = error * float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return Paired(
        mean=mean,
        standard_error=error,
        low=mean - reach,
        high=mean + reach,
        p=2 * _upper_tail(abs(mean), error, n - 1) if mean else 1.0,
        p_equivalent=_p_equivalent(mean, error, n - 1, margin),
        seeds=n,
    )


def _p_equivalent(mean: float, error: float, freedom: int, margin: float | None) -> float:
    if margin is None:
        return math.nan
    return max(_upper_tail(margin - mean, error, freedom), _upper_tail(margin + mean, error, freedom))


def _upper_tail(value: float, error: float, freedom: int) -> float:
    """P[T > value / error]; without any spread, 0 above zero and 1 at or below it."""
    if error == 0:
        return 0.0 if value > 0 else 1.0
    return float(stats.t.sf(value / error, freedom))


def slope(levels: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of values over levels: sum (x - mean x) y / sum (x - mean x)^2.

    Args:
        levels, values: one each per arm of one seed; levels not all the same.
    """
    x, y = np.asarray(levels, dtype=np.float64), np.asarray(values, dtype=np.float64)
    centred = x - x.mean()
    return float(centred @ y / (centred @ centred))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): reject where it is below alpha, and the family's error rate is alpha.

    The k-th smallest of m is multiplied by m - k + 1, and made at least as large as those before it. nan stays nan and
    counts as no test.
    """
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@attrs.frozen(kw_only=True)
class Judged:
    """What may be said of one comparison.

    Attributes:
        difference: the numbers.
        p, p_equivalent: Holm-adjusted over the comparisons.
        verdict: "equivalent" where the difference is shown to be smaller than the margin; "better" or "worse" where it
            is shown not to be zero, and not shown to be smaller than the margin; else, and with fewer than
            `FEWEST_SEEDS`, "not distinguishable".
    """

    difference: Paired
    p: float
    p_equivalent: float
    verdict: Verdict


def judge(
    differences: Mapping[str, Sequence[float]],
    *,
    margin: float | None,
    alpha: float = 0.05,
    higher_is_better: bool = True,
) -> dict[str, Judged]:
    """A verdict for each comparison, with the error rate of all of them together at `alpha`.

    Args:
        differences: name of the comparison -> paired differences, one per seed.
        margin: the smallest difference that matters; equivalence is shown against it, and not without it.
        alpha: chance of any false alarm among them: a difference where there is none; likewise for equivalence.
        higher_is_better: of the measure.
    """
    verdicts = {name: paired(values, margin=margin, confidence=1 - alpha) for name, values in differences.items()}
    different = holm([d.p for d in verdicts.values()])
    equivalent = holm([d.p_equivalent for d in verdicts.values()])
    judged = {}
    for (name, difference), p, p_equivalent in zip(verdicts.items(), different, equivalent, strict=True):
        verdict: Verdict = "not distinguishable"
        if difference.seeds < FEWEST_SEEDS:
            pass
        elif p_equivalent < alpha:
            verdict = "equivalent"
        elif p < alpha:
            verdict = "better" if (difference.mean > 0) == higher_is_better else "worse"
        judged[name] = Judged(difference=difference, p=p, p_equivalent=p_equivalent, verdict=verdict)
    return judged


# ----------------------------------------------------------------------------------------------------------- power


def power(seeds: int, *, difference: float, spread: float, alpha: float = 0.05) -> float:
    """Chance that a two-sided paired t test over `seeds` seeds finds a true difference.

    Args:
        seeds: n >= 2.
        difference: the true mean of the paired differences.
        spread: their standard deviation between seeds, > 0.
        alpha: of the test; divide by the number of arms for the first step of Holm's, the hardest.

    Returns:
        P[|T| > t_(1 - alpha/2, n-1)] with T noncentral t, noncentrality difference sqrt(n) / spread.

    Raises:
        ValueError: for fewer than 2 seeds or without a spread.
    """
    if seeds < 2 or not spread > 0:
        raise ValueError(f"power(seeds={seeds}, spread={spread}): use at least 2 seeds and a spread above 0.")
    bound, shift = float(stats.t.ppf(1 - alpha / 2, seeds - 1)), abs(difference) * math.sqrt(seeds) / spread
    if shift > 35:  # scipy's noncentral t fails far out, where the answer is 1 to every digit
        return 1.0
    return float(stats.nct.sf(bound, seeds - 1, shift) + stats.nct.cdf(-bound, seeds - 1, shift))


def seeds_needed(difference: float, *, spread: float, alpha: float = 0.05, chance: float = 0.8) -> int | None:
    """The fewest seeds with which a difference is found with at least the chance asked for; None for too many.

    Args:
        difference: not 0.
        spread, alpha: see `power`.
        chance: in (0, 1).
    """
    low, high = 1, 2
    while power(high, difference=difference, spread=spread, alpha=alpha) < chance:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(middle, difference=difference, spread=spread, alpha=alpha) >= chance
        low, high = (low, middle) if enough else (middle, high)
    return high


def detectable(seeds: int, *, spread: float, alpha: float = 0.05, chance: float = 0.8) -> float:
    """The smallest true difference that so many seeds find with at least the chance asked for, by bisection."""
    low, high = 0.0, spread
    while power(seeds, difference=high, spread=spread, alpha=alpha) < chance:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        enough = power(seeds, difference=middle, spread=spread, alpha=alpha) >= chance
        low, high = (low, middle) if enough else (middle, high)
    return high
