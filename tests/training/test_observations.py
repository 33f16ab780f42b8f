"""What the log says about a batch."""

from __future__ import annotations

import math

import pytest
import torch

from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.noise_aware import NoiseAware
from rlt2i.credit.text_attention import TextAttention
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.training.observations import observations, weight_statistics
from tests.helpers.build import collect, toy_algorithm, toy_engine

EVERY = torch.ones(4, dtype=torch.bool)


def test_a_map_by_hand():
    # Two of four cells have weight 2, the others 0: half the entropy of four cells, half the support.
    weight = torch.tensor([[2.0, 2.0], [0.0, 0.0]]).view(1, 1, 2, 2)
    seen = weight_statistics(weight, EVERY)
    assert set(seen) == {"map/entropy", "map/effective_support", "map/max"}
    assert float(seen["map/entropy"]) == pytest.approx(math.log(2) / math.log(4))
    assert float(seen["map/effective_support"]) == pytest.approx(0.5)
    assert float(seen["map/max"]) == 2.0


def test_a_time_weight_by_hand_counts_the_trained_steps_alone():
    # Steps 0 and 1 are trained, with weights 1.5 and 0.5: (1.5 + 0.5)^2 / (2 (2.25 + 0.25)) = 0.8.
    weight = torch.tensor([1.5, 0.5, 1.0, 1.0]).view(1, 4, 1, 1)
    seen = weight_statistics(weight, torch.tensor([True, True, False, False]))
    assert set(seen) == {"time/entropy", "time/effective_support", "time/max"}
    assert float(seen["time/effective_support"]) == pytest.approx(0.8)
    assert float(seen["time/max"]) == 1.5
    assert float(seen["time/entropy"]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2))


def test_all_steps_of_a_deterministic_rollout_are_trained():
    weight = torch.tensor([1.5, 0.5, 1.0, 1.0]).view(1, 4, 1, 1)
    assert float(weight_statistics(weight, ~EVERY)["time/effective_support"]) == pytest.approx(16 / (4 * 4.5))


def test_uniform_credit_has_no_shape():
    assert weight_statistics(torch.ones(1, 1, 1, 1), EVERY) == {}


@pytest.mark.parametrize(
    ("allocations", "axes"),
    [((), set()), ((NoiseAware(),), {"time"}), ((TextAttention(blocks="0", doubt=0.0),), {"map", "time"})],
)
def test_every_allocation_reports_its_concentration(allocations, axes):
    credit = Product(advantage=GroupRelative(), allocations=allocations)
    batch = collect(toy_engine(toy_algorithm(ClippedSurrogate(), credit=credit)))
    seen = observations([batch], lambda values: float(values.mean()))
    for axis in ("map", "time"):
        for name in ("entropy", "effective_support", "max"):
            assert (f"{axis}/{name}" in seen) == (axis in axes)
    assert "reward/mean" in seen
    if "map" in axes:  # a map moves credit between places, not between steps
        assert seen["time/entropy"] == pytest.approx(1.0)
        assert seen["map/entropy"] < 1
