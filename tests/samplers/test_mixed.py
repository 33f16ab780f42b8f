"""Windows that move: which steps are stochastic, and that the rest of the trajectory is the ODE."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt2i.functional.transitions import euler
from rlt2i.interfaces import Sampler
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.samplers.mixed import RandomWindowSDE, SlidingSDE
from tests.helpers.build import collect, toy_algorithm, toy_engine, toy_learner


def test_sliding_window_by_hand():
    # Five steps, the last one never stochastic: two rollout batches at each of 0, 1, 2, 3, then again from the start.
    sampler = SlidingSDE(num_steps=5, width=2, stride=1, period=2)
    found = [sampler.stochastic_steps(update) for update in range(10)]
    assert found == [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3,), (3,), (0, 1), (0, 1)]


def test_sliding_window_may_stay_at_the_end():
    sampler = SlidingSDE(num_steps=6, width=2, stride=2, period=1, last=4, roll_back=False)
    assert [sampler.stochastic_steps(update) for update in (0, 1, 2, 9)] == [(0, 1), (2, 3), (2, 3), (2, 3)]


@settings(max_examples=50, deadline=None)
@given(
    num_steps=st.integers(2, 30), width=st.integers(1, 6), stride=st.integers(1, 6), period=st.integers(1, 9),
    update=st.integers(0, 500), seed=st.integers(0, 9),
)  # fmt: skip
def test_windows_are_never_empty_and_never_reach_the_last_step(num_steps, width, stride, period, update, seed):
    width = min(width, num_steps - 1)
    sliding = SlidingSDE(num_steps=num_steps, width=width, stride=stride, period=period).stochastic_steps(update)
    drawn = RandomWindowSDE(num_steps=num_steps, width=width, high=num_steps - 1, seed=seed).stochastic_steps(update)
    for steps in (sliding, drawn):
        assert steps == tuple(range(steps[0], steps[-1] + 1))
        assert 0 <= steps[0] <= steps[-1] < num_steps - 1
    assert len(sliding) <= width
    assert len(drawn) == width


def test_random_windows_cover_their_range_and_are_a_function_of_the_batch():
    sampler = RandomWindowSDE(num_steps=10, width=3)
    found = [sampler.stochastic_steps(update) for update in range(60)]
    assert set(found) == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}  # half of ten steps, as published
    assert found == [RandomWindowSDE(num_steps=10, width=3).stochastic_steps(update) for update in range(60)]
    assert found != [RandomWindowSDE(num_steps=10, width=3, seed=1).stochastic_steps(update) for update in range(60)]


@pytest.mark.parametrize("sampler", [SlidingSDE(num_steps=6, width=2, period=1), RandomWindowSDE(num_steps=6, width=2)])
def test_outside_of_the_window_the_trajectory_is_the_ode(sampler: Sampler):
    algorithm = toy_algorithm(ClippedSurrogate(), sampler=sampler)
    for update in (0, 2):
        trajectory = collect(toy_engine(algorithm), update=update, prompts=1, group_size=4).experience.trajectory
        steps = sampler.stochastic_steps(update)
        assert trajectory.stochastic.nonzero().flatten().tolist() == list(steps)
        for t in range(6):
            state, sigma = trajectory.latents[:, t], trajectory.sigmas
            with torch.no_grad():
                velocity = algorithm.policy.velocity(state, sigma[t].expand(4), trajectory.conditioning)
            follows = torch.allclose(
                euler(state, velocity, sigma[t], sigma[t + 1]).mean, trajectory.latents[:, t + 1], atol=1e-6
            )
            assert follows == (t not in steps)
            assert bool((trajectory.log_probs[:, t] != 0).any()) == (t in steps)


def test_only_the_window_is_trained():
    algorithm = toy_algorithm(ClippedSurrogate(), sampler=SlidingSDE(num_steps=6, width=2, period=1))
    metrics = toy_learner(algorithm).learn(collect(toy_engine(algorithm), update=1, prompts=1, group_size=4).experience)
    assert {name.split("@")[1] for name in metrics if "@" in name} == {"1", "2"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingSDE(num_steps=4, width=4), "width <= 3"),
        (lambda: SlidingSDE(num_steps=4, width=2, last=5), "0 < last <= 4"),
        (lambda: SlidingSDE(period=0), "period"),
        (lambda: RandomWindowSDE(num_steps=4, width=3), "high <= 4"),
        (lambda: RandomWindowSDE(num_steps=10, width=3, low=8, high=10), "low \\+ width <= high"),
    ],
)
def test_windows_outside_of_the_trajectory_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
