"""Measures of maps by hand, and the probe on a policy small enough to probe in a second."""

from __future__ import annotations

import math
from pathlib import Path

import attrs
import pytest
import torch

from rlt2i.bench.controls import controls_of
from rlt2i.bench.maps import (
    blocks_of,
    localisation_lift,
    overlap_of_peaks,
    rank_correlation,
    share_by_decile,
    sign_agreement,
)
from rlt2i.bench.measures import diversity, drift, edges_outside
from rlt2i.bench.probe import Probe
from rlt2i.bench.probe_rows import Tally, table
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.samplers.ode import ODE
from tests.helpers.toy_recipe import clipped, nft


def test_localisation_lift_by_hand():
    inside = torch.tensor([[[True, False], [False, False]]])
    # A quarter of the area with half of the weight, then all of it, then none.
    maps = torch.tensor([[[[3.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]]]])
    torch.testing.assert_close(localisation_lift(maps, inside), torch.tensor([[2.0, 4.0, 0.0]]))
    assert localisation_lift(maps, torch.ones(1, 2, 2, dtype=torch.bool)).isnan().all()


def test_rank_correlation_by_hand():
    a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    b = torch.tensor([[10.0, 20.0, 90.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    # The third: ranks 1 2 3 against 1 3 2, so 1 - 6 (0 + 1 + 1) / (3 x 8) = 1/2.
    found = rank_correlation(a, b)
    torch.testing.assert_close(found[:3], torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))
    assert found[3].isnan()


def test_overlap_of_peaks_by_hand():
    a, b = torch.tensor([[4.0, 3.0, 0.0, 0.0]]), torch.tensor([[4.0, 0.0, 3.0, 0.0]])
    assert overlap_of_peaks(a, a, share=0.5) == 1
    assert overlap_of_peaks(a, b, share=0.5) == pytest.approx(1 / 3)


def test_deciles_blocks_and_signs_by_hand():
    values, weight = torch.arange(10.0), torch.arange(10.0).flip(0)
    torch.testing.assert_close(share_by_decile(values, weight, parts=5), torch.tensor([8.5, 6.5, 4.5, 2.5, 0.5]))
    assert blocks_of(torch.arange(16.0).view(1, 4, 4), 2).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    credit, gains = torch.tensor([[1.0, -1.0, 1.0, 0.0]]), torch.tensor([[2.0, 3.0, math.nan, 1.0]])
    assert sign_agreement(credit, gains) == 0.5


def test_a_tally_leaves_nan_out():
    tally = Tally()
    for values in ([1.0, 3.0], [4.0, math.nan], [math.nan, math.nan], [6.0]):
        tally.add("star", "lift", torch.tensor(values))
    (row,) = tally.rows("base")
    # Means of batches 2, 4 and 6: mean 4, standard error 2 / sqrt(3).
    assert (row.value, row.batches) == (4.0, 3)
    assert row.error == pytest.approx(2 / math.sqrt(3))


def test_drift_and_background_by_hand():
    before = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    after = before.clone()
    after[..., 0, 0] = 255
    after[..., 0, 1] = 51
    inside = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    # Inside all changed; outside 51/255 on one of three pixels.
    assert drift(before, after, inside) == pytest.approx(
        {"drift/inside": 1.0, "drift/outside": 0.2 / 3, "selectivity": 15.0}
    )
    assert edges_outside(after, torch.zeros(1, 2, 2)) == pytest.approx(0.8 + 1.0)
    assert edges_outside(after, inside) == 0


def test_diversity_counts_prompts_with_several_images():
    images = torch.stack([torch.full((3, 16, 16), v, dtype=torch.uint8) for v in (0, 0, 0, 255)])
    assert diversity(["a", "b", "c", "d"], images) == {}
    found = diversity(["a", "a", "b", "b"], images)
    # Prompt a has two copies (distance 0, one effective image of two); b has opposites (cosine -1).
    assert found["diversity/cosine_distance"] == pytest.approx(1.0, abs=1e-5)


def test_controls_need_one_map():
    assert list(controls_of(clipped())) == ["uniform", "own map", "shuffled", "inverted", "oracle"]
    uniform = attrs.evolve(clipped(), credit=Product(advantage=GroupRelative()))
    with pytest.raises(ValueError, match="has 0 maps over places"):
        controls_of(uniform)


def test_probe_on_the_toy_policy():
    probe = Probe.of(clipped(), prompts=2, group_size=4, seed=0)
    before = {k: v.detach().clone() for k, v in probe.policy.trainable_parameters().items()}
    said: list[str] = []
    rows = probe.measure("step 3", batches=3, interventions=1, say=said.append)
    assert said[0].startswith("step 3: batch 1 of 3")
    assert said[3].startswith("step 3: intervention 1 of 1")
    assert len(said) == 4
    for name, value in probe.policy.trainable_parameters().items():
        assert torch.equal(value, before[name]), "a probe must leave the weights as they are"
    found = {(row.credit, row.measure): row.value for row in rows}
    # Uniform credit knows nothing; the oracle on a quarter, half mixed with uniform, has 1/2 + 1/2 x (nearly 4).
    assert found["uniform", "localisation lift, step 0"] == pytest.approx(1.0)
    assert found["oracle", "localisation lift, step 0"] == pytest.approx(0.5 + 0.5 * 4, abs=0.15)
    assert found["uniform", "effective support"] == pytest.approx(1.0)
    # A permutation keeps support and maximum, and the same weights give the same maps.
    for measure in ("effective support", "largest weight"):
        assert found["own map", measure] == pytest.approx(found["shuffled", measure], rel=1e-5)
    assert found["own map", "map drift, overlap with the base's, step 0"] == pytest.approx(1.0)
    assert found["uniform", "gradient SNR over uniform"] == 1.0
    for measure in ("step-sign agreement", "influence, rank correlation", "places clipped after one step"):
        assert ("own map", measure) in found, measure
    batches = {(row.credit, row.measure): row.batches for row in rows}
    assert batches["own map", "places clipped after one step"] == 3
    assert batches["own map", "map drift, overlap with the base's, step 0"] == 3
    assert batches["own map", "influence, rank correlation"] == 1
    assert 0 <= found["own map", "step-sign agreement"] <= 1
    assert "own map" in table(rows)


def test_a_probe_goes_on_from_the_batches_it_kept(tmp_path: Path):
    probe = Probe.of(clipped(), prompts=2, group_size=4, seed=0)
    whole = probe.measure("base", batches=3, interventions=2, say=lambda _: None)
    said: list[str] = []
    probe.measure("base", batches=2, interventions=1, folder=tmp_path, say=said.append)
    again = Probe.of(clipped(), prompts=2, group_size=4, seed=0)
    resumed = again.measure("base", batches=3, interventions=2, folder=tmp_path, say=said.append)
    assert repr(resumed) == repr(whole)  # an error over one batch would be nan, which equals nothing
    assert len(said) == 3 + 2  # two batches and an intervention, then what is new
    with pytest.raises(ValueError, match="batches of another probe"):
        Probe.of(clipped(), prompts=2, group_size=4, seed=1).measure(
            "base", batches=3, interventions=1, folder=tmp_path
        )


def test_probe_of_a_deterministic_sampler_redraws_no_noise():
    recipe = attrs.evolve(nft(), sampler=ODE(num_steps=5))
    said: list[str] = []
    rows = Probe.of(recipe, prompts=2, group_size=4, seed=0).measure(
        "base", batches=3, interventions=1, say=said.append
    )
    assert len(said) == 3
    measures = {row.measure for row in rows}
    assert "gradient SNR" in measures
    assert "influence, rank correlation" not in measures
    assert "places clipped after one step" not in measures
