"""The alarm rings when reward rises and something else falls, and only then."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from rlt2i.training.alarm import hacking_alarms

CURVES = Path(__file__).resolve().parents[2] / "benchmarks" / "curves"

BASE = {
    "reward/mean": 0.4,
    "eval/strict": 0.5,
    "eval/objects": 1.7,
    "eval/objects_asked": 1.75,
    "eval/heldout/taste": 5.5,
    "eval/heldout/taste_std": 0.5,
    "eval/heldout/match": 0.28,
    "eval/heldout/match_std": 0.04,
    "eval/heldout/wish": 0.3,
    "eval/heldout/wish_std": 1.0,
    "health/edge_density": 0.2,
    "health/colour_entropy": 5.0,
    "health/saturation": 0.3,
    "health/high_frequency_energy": 0.1,
    "health/dark_fraction": 0.1,
    "diversity/cosine_distance": 0.4,
}
GAINS = {f"eval/heldout/{name}_gain{end}": 0.01 for name in ("taste", "match", "wish") for end in ("", "_low", "_high")}


def now(changes: dict[str, float] | None = None) -> dict[str, float]:
    healthy = BASE | GAINS | {"reward/mean": 0.6, "eval/strict_gain": 0.1, "eval/strict_gain_high": 0.14}
    return healthy | (changes or {})


def alarms(changes: dict[str, float], before: dict[str, float] = BASE) -> list[str]:
    return hacking_alarms(before, now(changes), headline="strict")


def falls(name: str, by: float, high: float) -> dict[str, float]:
    return {f"eval/heldout/{name}_gain": -by, f"eval/heldout/{name}_gain_high": high}


def test_silent_while_everything_rises():
    assert alarms({}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval/strict_gain": -0.2, "eval/strict_gain_high": -0.1}, "held-out strict fell by 0.200"),
        ({"health/edge_density": 0.08}, "edge density fell by 60%"),
        ({"health/colour_entropy": 3.0}, "colour entropy fell by 40%"),
        ({"health/saturation": 0.15}, "saturation fell by 50%"),
        ({"health/saturation": 0.63}, "saturation rose by 110%"),
        ({"health/high_frequency_energy": 0.25}, "high frequency energy rose by 150%"),
        ({"health/dark_fraction": 0.4}, "dark pixels rose from 10% to 40%"),
        ({"diversity/cosine_distance": 0.1}, "the distance between the images of a prompt fell by 75%"),
        ({"eval/objects": 3.6}, "3.60 objects per image where 1.75 were asked for"),
        (
            falls("taste", 0.6, -0.4) | falls("match", 0.08, -0.05),
            "held-out rewards fell: taste by 0.6 (1.2 sigma), match by 0.08 (2.0 sigma)",
        ),
    ],
)
def test_rings_for_each_thing_that_falls(changes: dict[str, float], message: str):
    assert alarms(changes) == [message]


@pytest.mark.parametrize(
    "changes",
    [
        {"eval/strict_gain": -0.05, "eval/strict_gain_high": 0.02},  # within chance
        {"health/edge_density": 0.14, "health/saturation": 0.5, "health/dark_fraction": 0.0},  # another style
        {"diversity/cosine_distance": 0.25},  # training narrows
        falls("taste", 3.0, -2.0),  # one of three
        falls("taste", 0.4, -0.3) | falls("match", 0.03, -0.02),  # beyond chance, less than a sigma
        falls("taste", 0.6, 0.1) | falls("match", 0.08, 0.02),  # more than a sigma, on so few images that it is chance
    ],
)
def test_silent_for_what_may_well_be_harmless(changes: dict[str, float]):
    assert alarms(changes) == []


def test_the_only_held_out_reward_is_enough_where_there_is_one():
    others = ("match", "wish")
    before = {k: v for k, v in BASE.items() if not any(name in k for name in others)}
    assert alarms(falls("taste", 0.6, -0.4), before) == ["held-out rewards fell: taste by 0.6 (1.2 sigma)"]


def test_silent_when_the_trained_reward_did_not_rise():
    # Then it is not hacking but plain failure, which the curve shows.
    assert alarms({"reward/mean": 0.4, "eval/objects": 3.6}) == []


def test_what_was_not_logged_or_not_finite_is_no_alarm():
    nothing = dict.fromkeys(BASE)
    assert hacking_alarms(nothing, now(), headline="strict") == []
    assert hacking_alarms(BASE, {name: float("nan") for name in now()} | {"reward/mean": 0.6}, headline="strict") == []
    assert hacking_alarms({}, {"reward/mean": 0.6}, headline="strict") == []


@pytest.mark.parametrize("name", ["star-nft-shapes", "uniform-nft-shapes", "star-shapes", "uniform-shapes"])
def test_silent_over_the_shipped_demo_and_its_controls(name: str):
    with (CURVES / f"{name}-s0.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if "/" in k and v} for row in csv.DictReader(file)]
    before, *later = rows
    assert later
    for row in later:
        assert hacking_alarms(before, row, headline="strict") == []
