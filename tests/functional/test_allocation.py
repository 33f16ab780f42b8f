"""Weight maps: attention allocation, controls, statistics, and weights over time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlt2i.functional.allocation import attention_allocation
from rlt2i.functional.maps import blur2d, effective_support, inverted_map, mean_one, rank_map, residual_contrast
from rlt2i.functional.schedules import sd3_sigmas
from rlt2i.functional.time_weights import (
    chunk_by_relative_l1,
    inverse_dt_weights,
    noise_aware_weights,
    proportional_dt_weights,
    relative_l1,
)
from rlt2i.functional.transitions import flow_sde
from rlt2i.training.observations import map_entropy

PLAIN = {"blur": 0.0, "floor": 0.0, "ceiling": 1e6, "doubt": 0.0}
knobs = st.fixed_dictionaries(
    {
        "mix": st.floats(0, 1),
        "sharpness": st.floats(0.25, 4),
        "blur": st.floats(0, 3),
        "floor": st.floats(0, 1),
        "ceiling": st.floats(1, 8),
        "doubt": st.floats(0, 3),
        "aggregate": st.sampled_from(["mean", "max", "softmax"]),
        "normalise": st.sampled_from(["mean_one", "minmax", "sum_one", "rank"]),
    }
)


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_maps(rows: list) -> Tensor:
    """[K, h, w] nested lists -> [1, 1, K, h, w]."""
    return torch.tensor(rows, dtype=torch.float64)[None, None]


def test_attention_allocation_by_hand():
    # Mean-one concepts (2, 2, 0, 0) and (0, 4, 0, 0): their mean (1, 3, 0, 0) already has mean one.
    maps = as_maps([[[6.0, 6.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    weight = attention_allocation(maps, mix=1.0, **PLAIN)
    torch.testing.assert_close(weight[0, 0], torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.float64))
    # Half way to uniform, and then squeezed into [.75, 1.5]: (1, 2, .5, .5) -> (1, 1.5, .75, .75), which has mean
    # one.
    weight = attention_allocation(maps, mix=0.5, **{**PLAIN, "floor": 0.75, "ceiling": 1.5})
    torch.testing.assert_close(weight[0, 0], torch.tensor([[1.0, 1.5], [0.75, 0.75]], dtype=torch.float64))


def test_the_unused_share_decides_how_far_a_map_is_trusted():
    # Half of the places are used, (5 + 5)^2 / (4 x 50), so mix = 1/2 and the weights are (1 + 2) / 2 and 1/2.
    maps = as_maps([[[5.0, 5.0], [0.0, 0.0]]])
    weight = attention_allocation(maps, mix=1.0, **{**PLAIN, "doubt": 1.0})
    torch.testing.assert_close(weight[0, 0], torch.tensor([[1.5, 1.5], [0.5, 0.5]], dtype=torch.float64))


@pytest.mark.parametrize("doubt", [0.0, 0.5, 2.0])
def test_doubt_does_not_know_the_size_of_the_grid(doubt: float):
    # The same picture on finer and finer grids: ten times as bright on a tenth of the area.
    support = []
    for side in (10, 20, 40):
        maps = torch.ones(1, 1, 1, side, side, dtype=torch.float64)
        maps[..., : side // 5, : side // 2] = 10.0
        weight = attention_allocation(maps, **{**PLAIN, "doubt": doubt}, mix=0.5)
        support.append(effective_support(weight).item())
    assert support[0] == pytest.approx(support[1]) == pytest.approx(support[2])
    if doubt == 0:  # weights 3.13 inside and .763 outside
        assert support[0] == pytest.approx(1 / (0.1 * (0.5 + 5 / 1.9) ** 2 + 0.9 * (0.5 + 0.5 / 1.9) ** 2))


@settings(max_examples=40, deadline=None)
@given(knobs)
def test_laws_of_the_allocation(options: dict):
    maps = random_maps(2, 3, 2, 4, 5)
    weight = attention_allocation(maps, **options)
    assert weight.shape == (2, 3, 4, 5)
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()
    if options["normalise"] in ("mean_one", "rank"):
        torch.testing.assert_close(weight.mean(dim=(-2, -1)), torch.ones(2, 3, dtype=torch.float64))
    for uniform in (
        attention_allocation(maps, **{**options, "mix": 0.0}),
        attention_allocation(torch.full_like(maps, 0.3), **options),
        attention_allocation(torch.zeros_like(maps), **options),
    ):
        assert (uniform == 1).all()  # exactly: mix 0 must be bit-equal to Flow-GRPO


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_constant_map_gives_exactly_ones_in_every_precision(dtype):
    maps = torch.tensor([0.1, 0.3], dtype=dtype)[None, None, :, None, None].expand(1, 1, 2, 7, 3)
    weight = attention_allocation(maps, mix=1.0, doubt=0.0)
    assert (weight == 1).all()
    assert weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("aggregate", ["mean", "max", "softmax"])
def test_a_concept_without_mass_does_not_count(aggregate):
    maps = random_maps(1, 2, 2, 4, 4)
    with_nothing = torch.cat([maps, torch.zeros(1, 2, 1, 4, 4)], dim=2)
    for knob in ({}, PLAIN):
        torch.testing.assert_close(
            attention_allocation(with_nothing, aggregate=aggregate, **knob),
            attention_allocation(maps, aggregate=aggregate, **knob),
        )


def test_the_scale_of_a_concept_does_not_matter():
    maps = random_maps(1, 2, 3, 4, 4)
    scaled = maps * torch.tensor([1e-3, 1.0, 50.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(attention_allocation(scaled), attention_allocation(maps))


@pytest.mark.parametrize("normalise", ["mean_one", "minmax", "sum_one", "rank"])
def test_permuting_places_permutes_weights(normalise):
    maps = random_maps(1, 1, 2, 1, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    options = {"mix": 0.8, "blur": 0.0, "normalise": normalise}
    expected = attention_allocation(maps, **options)[..., order]
    torch.testing.assert_close(attention_allocation(maps[..., order], **options), expected)


def test_minmax_and_sum_one_normalise_as_they_say():
    maps = as_maps([[[1.0, 3.0], [0.0, 0.0]]])
    for normalise, expected in (("minmax", [[1 / 3, 1.0], [0, 0]]), ("sum_one", [[0.25, 0.75], [0, 0]])):
        weight = attention_allocation(maps, mix=1.0, normalise=normalise, **PLAIN)
        torch.testing.assert_close(weight[0, 0], torch.tensor(expected, dtype=torch.float64))


def test_mean_one_by_hand():
    weight = torch.tensor([[1.0, 3.0], [0.1, 0.1], [0.0, 0.0]])
    scaled = mean_one(weight, 1)
    torch.testing.assert_close(scaled[0], torch.tensor([0.5, 1.5]))
    assert (scaled[1:] == 1).all()


def test_blur_keeps_constants_and_spreads_a_point():
    torch.testing.assert_close(blur2d(torch.full((2, 5, 3), 7.0), 1.5), torch.full((2, 5, 3), 7.0))
    point = torch.zeros(5, 5, dtype=torch.float64)
    point[2, 2] = 1.0
    blurred = blur2d(point, 1.0)
    torch.testing.assert_close(blurred, blurred.T)
    torch.testing.assert_close(blurred, blurred.flip(0))
    kernel = [math.exp(-(d**2) / 2) for d in (-2, -1, 0, 1, 2)]
    assert blurred[2, 2].item() == pytest.approx(1 / sum(kernel) ** 2)
    assert torch.equal(blur2d(point, 0.0), point)


def test_ranks_share_ties():
    # Ranks 1, 2.5, 2.5, 4 over their mean 2.5.
    ranks = rank_map(torch.tensor([[0.1, 5.0], [5.0, 9.0]]))
    torch.testing.assert_close(ranks, torch.tensor([[0.4, 1.0], [1.0, 1.6]]))


def test_inverted_map_by_hand():
    weight = torch.tensor([[0.0, 1.0], [1.0, 2.0]])
    torch.testing.assert_close(inverted_map(weight), torch.tensor([[2.0, 1.0], [1.0, 0.0]]))
    assert (inverted_map(torch.full((3, 3), 0.7)) == 1).all()


def test_residual_contrast_by_hand():
    contrast = residual_contrast(torch.tensor([[[1.0, 5.0]]]), torch.tensor([[[2.0, 2.0]]]))
    torch.testing.assert_close(contrast, torch.tensor([[[0.5, 1.5]]]))


def test_statistics_by_hand():
    weight = torch.tensor([[[2.0, 2.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]], [[4.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(map_entropy(weight), torch.tensor([0.5, 1.0, 0.0]))
    torch.testing.assert_close(effective_support(weight), torch.tensor([0.5, 1.0, 0.25]))
    assert map_entropy(torch.ones(1, 1)) == 1  # a single place: nothing to be unsure about


def test_time_weights_by_hand():
    sigmas = torch.tensor([1.0, 0.5, 0.25, 0.0])
    torch.testing.assert_close(proportional_dt_weights(sigmas), torch.tensor([1.5, 0.75, 0.75]))
    torch.testing.assert_close(inverse_dt_weights(sigmas), torch.tensor([0.6, 1.2, 1.2]))
    first_two = torch.tensor([True, True, False])
    torch.testing.assert_close(proportional_dt_weights(sigmas, mask=first_two), torch.tensor([4 / 3, 2 / 3, 0.0]))
    torch.testing.assert_close(noise_aware_weights(torch.tensor([1.0, 3.0])), torch.tensor([0.5, 1.5]))


def test_guard_and_tempflow_weights_of_the_sd3_schedule():
    # Flow-SDE's std falls along the rollout, so TempFlow favours early steps; so does 1 / dt.
    sigmas, zeros = sd3_sigmas(10), torch.zeros(10, 1, 1, 1)
    std = flow_sde(zeros, zeros, sigmas[:-1], sigmas[1:], sigma_max=sigmas[1], noise_level=0.7).std.flatten()
    trained = torch.arange(10) < 9
    for weights in (noise_aware_weights(std, mask=trained), inverse_dt_weights(sigmas, mask=trained)):
        assert weights[trained].mean().item() == pytest.approx(1.0)
        assert weights[0] > 3 * weights[8]
        assert weights[9] == 0


def test_chunks_by_hand():
    # Steps that change alike stay together.
    curve = torch.tensor([0.9, 0.8, 0.1, 0.1, 0.1, 0.5])
    assert chunk_by_relative_l1(curve, 3) == (2, 3, 1)
    assert chunk_by_relative_l1(curve, 1) == (6,)
    assert chunk_by_relative_l1(curve.expand(2, 6), 6) == (1,) * 6


def test_relative_change_by_hand():
    latents = torch.tensor([2.0, 1.0, 1.0]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(relative_l1(latents), torch.tensor([[0.5, 0.0]]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: attention_allocation(torch.rand(1, 1, 4, 4)), "pass.*concept"),
        (lambda: attention_allocation(-torch.rand(1, 1, 1, 4, 4)), "negative values or nan"),
        (lambda: attention_allocation(torch.full((1, 1, 1, 2, 2), float("nan"))), "negative values or nan"),
        (lambda: attention_allocation(torch.rand(1, 1, 1, 2, 2), mix=1.5), "mix=1.5"),
        (lambda: attention_allocation(torch.rand(1, 1, 1, 2, 2), floor=2.0), "floor=2.0"),
        (lambda: attention_allocation(torch.rand(1, 1, 1, 2, 2), sharpness=0.0), "sharpness=0.0"),
        (lambda: attention_allocation(torch.rand(1, 1, 1, 2, 2), doubt=-1.0), "doubt=-1.0"),
        (lambda: attention_allocation(torch.rand(1, 1, 1, 2, 2), aggregate="min"), "aggregate='min'"),
        (lambda: attention_allocation(torch.rand(1, 1, 1, 2, 2), normalise="l2"), "normalise='l2'"),
        (lambda: blur2d(torch.rand(2, 2), -1.0), "blur=-1.0"),
        (lambda: chunk_by_relative_l1(torch.rand(3), 4), "num_chunks=4"),
        (lambda: noise_aware_weights(torch.rand(2), mask=torch.zeros(2, dtype=torch.bool)), "selects no step"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
