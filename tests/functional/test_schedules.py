"""Schedules and training times: by hand, then laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt2i.functional.schedules import even_sigmas, sd3_sigmas, shift_sigma
from rlt2i.functional.time_sampling import (
    logit_normal,
    normal_quantile,
    shift_towards,
    stratified_steps,
    stratified_times,
)
from tests.helpers.published_steps import constructed_sigmas, shifted_linspace_sigmas


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shift_by_hand():
    # 3 * .5 / (1 + 2 * .5) = .75
    assert shift_sigma(0.5, 3.0) == 0.75
    torch.testing.assert_close(shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 3.0), torch.tensor([0.0, 0.75, 1.0]))


def test_schedules_by_hand():
    # Lower end 3/1002, shifted again: 9/1002 / (1 + 6/1002) = 9/1008.
    torch.testing.assert_close(sd3_sigmas(2), torch.tensor([1.0, 9 / 1008, 0.0]))
    torch.testing.assert_close(shifted_linspace_sigmas(2, shift=3.0), torch.tensor([1.0, 0.75, 0.0]))
    torch.testing.assert_close(even_sigmas(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    torch.testing.assert_close(
        constructed_sigmas(shift=1.0, num_train_timesteps=4), torch.tensor([1.0, 0.75, 0.5, 0.25])
    )


@settings(max_examples=25, deadline=None)
@given(num_steps=st.integers(1, 60), shift=st.floats(0.5, 8.0))
def test_every_schedule_falls_strictly_from_one_to_zero(num_steps: int, shift: float):
    for sigmas in (
        sd3_sigmas(num_steps, shift=shift),
        shifted_linspace_sigmas(num_steps, shift=shift),
        even_sigmas(num_steps),
    ):
        assert sigmas.dtype == torch.float32
        assert sigmas.shape == (num_steps + 1,)
        assert sigmas[0] == 1
        assert sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()


def test_a_shift_towards_the_image_mirrors_one_towards_noise():
    sigma = torch.rand(20, generator=seeded(), dtype=torch.float64)
    noise, image = (shift_towards(sigma, 3.0, direction) for direction in ("noise", "image"))
    assert (noise >= sigma).all()
    assert (image <= sigma).all()
    torch.testing.assert_close(shift_towards(noise, 3.0, "image"), sigma)


def test_stratified_draws_fall_one_into_each_part():
    within = torch.rand(3, 16, generator=seeded())
    places = stratified_times(within)
    assert (places * 16).long().tolist() == [list(range(16))] * 3
    # Parts of [.2, .6] are .1 wide; half way into each.
    halves = stratified_times(torch.full((4,), 0.5), low=0.2, high=0.6)
    torch.testing.assert_close(halves, torch.tensor([0.25, 0.35, 0.45, 0.55]))


def test_logit_normal_by_hand():
    # The median is sigmoid(mean); one standard deviation up, sigmoid(mean + std); 84.13 % lie below it.
    normal = normal_quantile(torch.tensor([0.5, 0.8413447]))
    torch.testing.assert_close(normal, torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)
    found = logit_normal(normal, mean=1.0, std=2.0)
    torch.testing.assert_close(found, torch.sigmoid(torch.tensor([1.0, 3.0])), atol=1e-5, rtol=0)
    assert torch.isfinite(normal_quantile(torch.tensor([0.0, 1.0]))).all()


def test_steps_fall_one_into_each_bin_and_skip_the_first_on_request():
    # bounds floor(linspace(1, 9, 5)) = 1, 3, 5, 7, 9
    for seed in range(20):
        steps = stratified_steps(torch.rand(4, generator=seeded(seed)), first=1, last=9).tolist()
        assert all(low <= step < low + 2 for low, step in zip((1, 3, 5, 7), steps, strict=True))
    # More draws than steps: bins without width repeat their lower bound.
    assert stratified_steps(torch.rand(4, generator=seeded()), first=0, last=2).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sd3_sigmas(0), "num_steps=0"),
        (lambda: shift_sigma(0.5, 0.0), "shift=0.0"),
        (lambda: shift_towards(torch.ones(1), 3.0, "up"), "direction='up'"),
        (lambda: stratified_times(torch.zeros(2), low=0.5, high=0.5), "low=0.5"),
        (lambda: stratified_steps(torch.zeros(2), first=3, last=2), "first=3"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
