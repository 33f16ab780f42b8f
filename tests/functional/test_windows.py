"""Windows of stochastic steps, decay schedules, prompt order: by hand, then laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt2i.functional.ema import (
    constant_decay,
    cosine_decay,
    linear_decay,
    nft_old_decay,
    piecewise_linear_decay,
    power_decay,
    ramp_decay,
    warmup_cosine_decay,
)
from rlt2i.functional.windows import exponential_period, linear_period, random_subset, random_window, sliding_window
from tests.helpers.published_steps import ema_update, k_repeat_indices


def test_sliding_window_by_hand():
    # Five steps, the last one never: two updates at each of 0, 1, 2, 3, then again from the start.
    windows = [sliding_window(update, num_steps=5, width=2, period=2) for update in range(10)]
    once = [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3,), (3,)]
    assert windows == [*once, (0, 1), (0, 1)]
    stay = [sliding_window(update, num_steps=5, width=2, period=2, roll_back=False) for update in range(10)]
    assert stay == [*once, (3,), (3,)]
    assert sliding_window(1, num_steps=5, width=2, period=1, stride=2, last=5) == (2, 3)


@settings(max_examples=40, deadline=None)
@given(
    update=st.integers(0, 10_000),
    num_steps=st.integers(2, 40),
    width=st.integers(1, 8),
    stride=st.integers(1, 8),
    period=st.integers(1, 30),
)
def test_windows_are_never_empty_and_never_reach_the_last_step(update, num_steps, width, stride, period):
    window = sliding_window(update, num_steps=num_steps, width=width, stride=stride, period=period)
    assert 1 <= len(window) <= width
    assert window == tuple(range(window[0], window[-1] + 1))
    assert window[-1] < num_steps - 1


def test_periods_by_hand():
    assert [linear_period(start, first=8, least=2, last=4) for start in range(4)] == [8, 6, 5, 3]
    assert exponential_period(3, first=10, threshold=3, rate=1.0) == 10
    assert exponential_period(4, first=10, threshold=3, rate=1.0) == 4  # 10 / e = 3.68

    def period(start: int) -> int:
        return linear_period(start, first=2, least=1, last=2)

    windows = [sliding_window(update, num_steps=3, width=1, period=period) for update in range(4)]
    assert windows == [(0,), (0,), (1,), (0,)]


def test_random_windows_cover_their_range():
    generator = torch.Generator().manual_seed(0)
    windows = {random_window(width=3, low=1, high=6, generator=generator) for _ in range(100)}
    assert windows == {(1, 2, 3), (2, 3, 4), (3, 4, 5)}
    subsets = {random_subset(count=2, steps=3, generator=generator) for _ in range(100)}
    assert subsets == {(0, 1), (0, 2), (1, 2)}


def test_decays_by_hand():
    assert power_decay(0, decay=0.9, warmup=10) == 0.1
    assert power_decay(1000, decay=0.9, warmup=10) == 0.9
    assert [nft_old_decay(200, kind) for kind in range(3)] == [0.0, 0.2, 0.9375]
    assert ramp_decay(10, "0-0.25-0.005-0.999") == pytest.approx(0.3)
    assert ramp_decay(10, "slow") == ramp_decay(10, "1") == 0.01
    assert constant_decay(7, decay=0.5) == 0.5
    assert power_decay(7, decay=0.99, warmup=0) == 0.99
    assert linear_decay(5, decay=0.9, initial=0.1, warmup=10) == pytest.approx(0.5)
    assert piecewise_linear_decay(5, flat=5) == 0.0
    assert cosine_decay(5, decay=0.9, initial=0.1, total=10) == pytest.approx(0.5)
    # Linear to .4 over four steps, then half a cosine to .8 over the other six.
    assert [warmup_cosine_decay(s, decay=0.8, initial=0.4, warmup=4, total=10) for s in (2, 4, 7, 10)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8]
    )


def test_ema_is_no_alias():
    parameter = torch.ones(3)
    average = ema_update(torch.zeros(3), parameter, 0.0)
    parameter.add_(1)
    assert average.tolist() == [1.0, 1.0, 1.0]
    assert ema_update(torch.zeros(3), parameter, 0.75).tolist() == [0.5, 0.5, 0.5]


def test_every_prompt_of_a_batch_is_sampled_k_times():
    ranks = k_repeat_indices(50, batch_size=6, repeats=4, num_ranks=4, seed=7)
    drawn = [index for rank in ranks for index in rank]
    assert [len(rank) for rank in ranks] == [6, 6, 6, 6]
    assert sorted(drawn.count(index) for index in set(drawn)) == [4] * 6
    assert ranks == k_repeat_indices(50, batch_size=6, repeats=4, num_ranks=4, seed=7)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sliding_window(0, num_steps=5, width=0, period=1), "width=0"),
        (lambda: sliding_window(0, num_steps=5, width=1, period=0), "period gives"),
        (lambda: sliding_window(0, num_steps=5, width=1, period=1, last=6), "last=6"),
        (lambda: random_window(width=4, low=0, high=3, generator=torch.Generator()), "width=4"),
        (lambda: random_subset(count=4, steps=3, generator=torch.Generator()), "count=4"),
        (lambda: nft_old_decay(0, 3), "kind=3"),
        (lambda: ramp_decay(0, "75-0-0.0075"), "ramp='75-0-0.0075'"),
        (lambda: constant_decay(0, decay=1.5), "decay=1.5"),
        (lambda: warmup_cosine_decay(0, warmup=10, total=10), "warmup=10"),
        (lambda: k_repeat_indices(50, batch_size=6, repeats=5, num_ranks=2, seed=0), "whole groups of 5"),
        (lambda: k_repeat_indices(2, batch_size=6, repeats=4, num_ranks=2, seed=0), "only 2"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
