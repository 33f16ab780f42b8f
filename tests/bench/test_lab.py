"""Theory against the library's own parts, where theory knows the answer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rlt2i.bench.folder import read_table
from rlt2i.bench.gradients import jackknife_error, quality_of_grams
from rlt2i.bench.lab import expected_gain, expected_ratio_of_steps, gain_of_map, measure, train
from rlt2i.bench.lab_figure import lab_svg

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "bench" / "lab"


def test_theory_by_hand():
    # Half of the places judged, weights 3/2 and 1/2: (3/2)^2 / ((9/4 + 1/4) / 2) = 9/5.
    inside = torch.tensor([True, False])
    assert gain_of_map(torch.tensor([1.5, 0.5]), inside) == pytest.approx(1.8)
    assert expected_gain("oracle", 4) == pytest.approx(4, rel=1e-4)
    assert expected_gain("oracle", 4, mix=0.5) == pytest.approx(2.5**2 / ((2.5**2 + 3 * 0.5**2) / 4), rel=1e-4)
    assert expected_gain("shuffled", 4) == pytest.approx(1 / 4, rel=1e-4)
    assert expected_gain("inverted", 4) == pytest.approx(0, abs=1e-6)
    assert expected_gain("uniform", 1) == 1.0
    # SNR 1 and 1/3: cosines sqrt(1/2) and 1/2.
    assert expected_ratio_of_steps(1.0, 1 / 3) == pytest.approx(math.sqrt(2))


def test_quality_of_gradients_by_hand():
    # Gradients (2, 1), (2, -1), (2, 0): <g_i, g_j> = 3, 4, 4; |g|^2 = 5, 5, 4.
    g = torch.tensor([[2.0, 1.0], [2.0, -1.0], [2.0, 0.0]], dtype=torch.float64)
    quality = quality_of_grams({"uniform": g @ g.T, "twice": 4 * g @ g.T})
    signal, noise = 11 / 3, 14 / 3 - 11 / 3
    assert quality["uniform"].snr == pytest.approx(signal / noise)
    cosine = (3 / 5 + 2 * 4 / math.sqrt(20)) / 3
    assert quality["uniform"].cosine == pytest.approx(cosine)
    # A factor changes neither, and the gain over the first is 1 without any error.
    assert quality["twice"].gain == pytest.approx(1.0)
    assert quality["twice"].gain_error == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="3 or more"):
        quality_of_grams({"uniform": (g @ g.T)[:2, :2]})


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    without = (values.sum() - values) / 3
    assert float(jackknife_error(without)) == pytest.approx(float(values.std() / 2))


def test_the_committed_gains_are_what_theory_says():
    rows = read_table(RESULTS / "lab.csv")
    assert len(rows) > 20
    for row in rows:
        theory, gain, error = (float(row[name]) for name in ("theory", "gain", "gain_error"))
        assert abs(gain - theory) < 3 * error + 1e-3, row


def test_the_figure_draws_the_committed_tables():
    gains = [tuple(row.values()) for row in read_table(RESULTS / "lab.csv")]
    training = [
        (int(r["tokens"]), int(r["seed"]), r["credit"], float(r["gained"]))
        for r in read_table(RESULTS / "lab_training.csv")
    ]
    drawn = lab_svg(gains, training)
    for word in ("oracle", "shuffled", "inverted", "a = 1/16", "a = 4/16"):
        assert word in drawn, word


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "tokens", "mix"), [
    ("clipped, ratio of a place", 1, 1.0),
    ("clipped, ratio of a place", 4, 0.5),
    ("DiffusionNFT", 4, 1.0),
])  # fmt: skip
def test_gains_are_what_theory_says(objective: str, tokens: int, mix: float):
    gains = {gain.credit: gain for gain in measure(objective, tokens, mix=mix, batches=80)}
    for gain in gains.values():
        assert abs(gain.quality.gain - gain.expected) < 3 * gain.quality.gain_error + 1e-9, gain
    oracle, shuffled, inverted = (gains[name].quality for name in ("oracle", "shuffled", "inverted"))
    # And they are told apart from no gain at all. With 80 batches theory puts the nearest of them (a shuffled map of
    # mix 0.5, and the oracle under DiffusionNFT) a little over four standard errors away, so three are asked for.
    assert oracle.gain - 3 * oracle.gain_error > 1
    assert shuffled.gain + 3 * shuffled.gain_error < 1
    assert inverted.gain + 3 * inverted.gain_error < 1


@pytest.mark.slow
def test_training_follows_the_order_of_the_gains():
    gained = {name: sum(train(name, 4, seed=seed) for seed in range(2)) for name in ("uniform", "oracle", "inverted")}
    assert gained["oracle"] > 1.5 * gained["uniform"] > 0
    assert abs(gained["inverted"]) < 0.5 * gained["uniform"]
