"""Paired statistics of the benchmark: by hand, then what they promise, on simulated benchmarks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlt2i.bench.statistics import detectable, holm, judge, paired, power, seeds_needed, slope


def test_paired_by_hand():
    # Mean 2, standard deviation 1, so a standard error of 1/sqrt(3); t(.975, 2 degrees of freedom) = 4.3027.
    found = paired([1.0, 2.0, 3.0], margin=10.0)
    assert found.mean == pytest.approx(2.0)
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))
    assert found.low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    # With 2 degrees of freedom P[T > t] = 1/2 - t / (2 sqrt(2 + t^2)); here t = 2 sqrt(3).
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), abs=1e-12)
    # The upper side decides: T = (10 - 2) sqrt(3).
    t = 8 * math.sqrt(3)
    assert found.p_equivalent == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


def test_differences_that_are_all_the_same():
    none = paired([0.0, 0.0, 0.0], margin=0.01)
    assert (none.p, none.p_equivalent) == (1.0, 0.0)
    some = paired([0.5, 0.5, 0.5], margin=0.01)
    assert (some.p, some.p_equivalent) == (0.0, 1.0)


def test_one_seed_carries_nothing():
    assert math.isnan(paired([0.3], margin=0.1).p)
    assert judge({"star": [0.3]}, margin=0.1)["star"].verdict == "not distinguishable"


def test_two_seeds_that_agree_by_chance_carry_no_verdict():
    # One image of 240 more in both: no spread at all, and no evidence either.
    assert judge({"star": [1 / 240, 1 / 240]}, margin=0.001)["star"].verdict == "not distinguishable"
    assert judge({"star": [1 / 240] * 3}, margin=0.001)["star"].verdict == "better"


@pytest.mark.parametrize(("values", "margin"), [([], 1.0), ([1.0, math.nan], 1.0), ([1.0, 2.0], 0.0)])
def test_paired_refuses(values: list[float], margin: float):
    with pytest.raises(ValueError, match="paired"):
        paired(values, margin=margin)


def test_holm_by_hand():
    # Sorted: .01 x 3, .02 x 2, .04 x 1; the last is not allowed to fall below the one before it.
    assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    with_unknown = holm([0.01, math.nan])
    assert with_unknown[0] == pytest.approx(0.01)
    assert math.isnan(with_unknown[1])


def test_verdicts():
    small = [0.01, -0.01, 0.005, -0.005, 0.0, 0.002]
    differences = {
        "better": [0.5, 0.52, 0.48, 0.51, 0.5, 0.49],
        "worse": [-0.5, -0.52, -0.48, -0.51, -0.5, -0.49],
        "equivalent": small,
        "not distinguishable": [1.0, -1.0, 0.5, -0.5, 0.3, 0.2],
    }
    assert {name: j.verdict for name, j in judge(differences, margin=0.1).items()} == {
        name: name for name in differences
    }
    # Lower is better turns the sign around; without a margin nothing is equivalent.
    turned = judge(differences, margin=None, higher_is_better=False)
    assert turned["better"].verdict == "worse"
    assert turned["equivalent"].verdict == "not distinguishable"


def simulated(
    rng: np.random.Generator, *, arms: int, seeds: int, shift: float, spread: float
) -> dict[str, list[float]]:
    """Scores of arms that share a seed's luck, minus those of the reference; the first arm is `shift` better."""
    luck = rng.normal(0, 1.0, size=seeds)
    reference = luck + rng.normal(0, spread, size=seeds)
    scores = {f"arm{i}": luck + rng.normal(0, spread, size=seeds) + (shift if i == 0 else 0.0) for i in range(arms)}
    return {name: (values - reference).tolist() for name, values in scores.items()}


def test_false_alarms_over_200_benchmarks_stay_below_five_per_cent():
    # An alarm is any of six arms that are all the same as the reference being called better or worse.
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        found = judge(simulated(rng, arms=6, seeds=10, shift=0.0, spread=0.02), margin=0.01)
        alarms += any(j.verdict in ("better", "worse") for j in found.values())
    assert alarms / 200 < 0.05


def test_false_equivalence_over_200_benchmarks_stays_below_five_per_cent():
    # All arms truly differ by exactly the margin: calling one equivalent is the error.
    rng = np.random.default_rng(1)
    margin, errors = 0.02, 0
    for _ in range(200):
        noise = simulated(rng, arms=6, seeds=10, shift=0.0, spread=0.01)
        found = judge({arm: [v + margin for v in values] for arm, values in noise.items()}, margin=margin)
        errors += any(j.verdict == "equivalent" for j in found.values())
    assert errors / 200 < 0.05


def test_arms_that_are_the_same_are_called_equivalent():
    rng = np.random.default_rng(2)
    found = judge(simulated(rng, arms=3, seeds=12, shift=0.0, spread=0.004), margin=0.02)
    assert {j.verdict for j in found.values()} == {"equivalent"}


def test_slope_by_hand():
    # Deviations of x: -1.5, .5, 1; their products with y sum to 5, their squares to 3.5.
    assert slope([0, 2, 2.5], [1, 3, 5]) == pytest.approx(5 / 3.5)


@pytest.mark.parametrize(("true", "found"), [(0.0, (0, 20)), (0.2, (190, 200))])
def test_slopes_over_200_benchmarks(true: float, found: tuple[int, int]):
    # What a seed adds to all its arms, however much, cancels; spread of a slope: .01 / sqrt(.0734) = .037.
    levels, rng = np.array([0.5, 0.6, 0.71, 0.86]), np.random.default_rng(4)
    rises = 0
    for _ in range(200):
        scores = rng.normal(0, 1.0, size=(5, 1)) + true * levels + rng.normal(0, 0.01, size=(5, 4))
        rises += paired([slope(levels, values) for values in scores]).p < 0.05
    assert found[0] <= rises <= found[1]


@pytest.mark.parametrize("chance", [0.5, 0.8, 0.95])
def test_a_planted_difference_is_found_as_often_as_promised(chance: float):
    # Differences of two arms have a spread of sqrt(2) times that of one.
    shift, spread, arms = 0.03, 0.02, 4
    seeds = seeds_needed(shift, spread=spread * math.sqrt(2), alpha=0.05 / arms, chance=chance)
    assert seeds is not None
    promised = power(seeds, difference=shift, spread=spread * math.sqrt(2), alpha=0.05 / arms)
    rng = np.random.default_rng(3)
    runs = 300
    found = sum(
        judge(simulated(rng, arms=arms, seeds=seeds, shift=shift, spread=spread), margin=1e-3)["arm0"].verdict
        == "better"
        for _ in range(runs)
    )
    # Holm's later steps are easier than the first, so it may be found somewhat more often, never less.
    error = math.sqrt(promised * (1 - promised) / runs)
    assert promised - 3 * error < found / runs < promised + 0.05 + 3 * error


def test_power_against_the_normal_limit():
    # With many seeds t is normal: P[Z > 1.95996 - d sqrt(n)], d sqrt(n) = 2.8016 gives the textbook's 80 %.
    assert power(10_000, difference=2.8016 / 100, spread=1.0) == pytest.approx(0.80, abs=2e-3)
    assert power(10, difference=0.0, spread=1.0) == pytest.approx(0.05, abs=1e-6)
    assert power(1000, difference=5.0, spread=1.0) == 1.0


def test_seeds_needed_is_the_fewest():
    n = seeds_needed(0.5, spread=1.0)
    assert n is not None
    assert power(n, difference=0.5, spread=1.0) >= 0.8 > power(n - 1, difference=0.5, spread=1.0)
    assert n == 34  # Cohen (1988), table of the paired t test, d = .5
    assert seeds_needed(1e-6, spread=1.0) is None
    assert detectable(34, spread=1.0) == pytest.approx(0.5, abs=0.01)
