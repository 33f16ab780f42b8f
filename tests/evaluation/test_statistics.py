"""Intervals over prompts, against hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import t

from rlt2i.evaluation.statistics import (
    any_of_cluster,
    category_means,
    clustered_mean,
    mean_of_categories,
    mean_of_fixed_prompts,
    paired_difference,
)
from rlt2i.tasks.shapes.task import ShapesTask


def test_two_clusters_by_hand():
    # Prompt means 0 and 1. Two draws out of two: 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    found = clustered_mean(torch.tensor([0.0, 0.0, 1.0, 1.0]), ["a", "a", "b", "b"], seed=0, resamples=20_000)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert (found.clusters, found.values) == (2, 4)
    assert found.std_error == pytest.approx(math.sqrt(1 / 8), abs=0.01)
    middle = clustered_mean(torch.tensor([0.0, 1.0]), [0, 1], seed=0, confidence=0.4)
    assert (middle.low, middle.high) == (0.5, 0.5)  # quantiles .3 and .7 fall into the middle half
    assert str(found) == "0.5 [0, 1]"


def test_unequal_clusters_weigh_by_their_size():
    # Draws of (a, a), (a, b) or (b, b): 3/3, 3/4 (three of four values are 1) or 0/1.
    found = clustered_mean(torch.tensor([1.0, 1.0, 1.0, 0.0]), [1, 1, 1, 2], seed=0, confidence=0.4)
    assert (found.mean, found.low, found.high) == (0.75, 0.75, 0.75)
    wide = clustered_mean(torch.tensor([1.0, 1.0, 1.0, 0.0]), [1, 1, 1, 2], seed=0)
    assert (wide.low, wide.high) == (0.0, 1.0)


def test_standard_error_is_that_of_the_prompts_not_of_the_images():
    # 50 prompts of 8 equal images: sd / sqrt(50), not sd / sqrt(400).
    means = torch.randn(50, generator=torch.Generator().manual_seed(0))
    values = means.repeat_interleave(8)
    found = clustered_mean(values, [i // 8 for i in range(400)], seed=0, resamples=4000)
    expected = means.std(correction=0).item() / math.sqrt(50)
    assert found.std_error == pytest.approx(expected, rel=0.05)
    assert found.high - found.low == pytest.approx(2 * 1.96 * expected, rel=0.1)
    single = clustered_mean(values, range(400), seed=0, resamples=4000)
    assert single.std_error == pytest.approx(expected / math.sqrt(8), rel=0.05)


def test_coverage():
    # 95 % intervals of 40 standard normal prompts should hold 0 about 95 times in 100 (a little less:
    # percentile).
    hits = 0
    for trial in range(100):
        values = torch.randn(40, generator=torch.Generator().manual_seed(trial))
        found = clustered_mean(values, range(40), seed=trial, resamples=300)
        hits += found.low <= 0 <= found.high
    assert 87 <= hits <= 99


def test_seeded_and_independent_of_the_order_within_a_prompt():
    values = torch.rand(30, generator=torch.Generator().manual_seed(1))
    clusters = [i // 3 for i in range(30)]
    first = clustered_mean(values, clusters, seed=7)
    assert first == clustered_mean(values, clusters, seed=7)
    assert first.low != clustered_mean(values, clusters, seed=8).low
    turned = clustered_mean(values.view(10, 3).flip(1).flatten(), clusters, seed=7)
    assert turned.low == pytest.approx(first.low)


def test_many_clusters_go_through_in_chunks(monkeypatch):
    values = torch.rand(20, generator=torch.Generator().manual_seed(2))
    whole = clustered_mean(values, range(20), seed=0, resamples=50)
    monkeypatch.setattr("rlt2i.evaluation.statistics._CHUNK", 60)  # 3 draws of 20 at a time; 50 = 16 x 3 + 2
    assert clustered_mean(values, range(20), seed=0, resamples=50) == whole


def test_pairing_removes_what_the_prompt_adds():
    # Prompt scores differ wildly, each image gains exactly 0.25.
    before = torch.tensor([0.0, 10.0, -3.0, 8.0])
    gain = paired_difference(before + 0.25, before, ["a", "b", "c", "d"], seed=0)
    assert (gain.mean, gain.low, gain.high) == (0.25, 0.25, 0.25)
    by_hand = paired_difference(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), [0, 1], seed=0)
    assert (by_hand.mean, by_hand.low, by_hand.high) == (0.0, -1.0, 1.0)


def test_single_prompt_has_a_mean_and_no_interval():
    found = clustered_mean(torch.tensor([0.25, 0.75]), ["a", "a"], seed=0)
    assert found.mean == 0.5
    assert all(math.isnan(v) for v in (found.low, found.high, found.std_error))


def test_category_means_by_hand():
    means = category_means(torch.tensor([1.0, 0.0, 1.0, 0.5]), ["two", "one", "two", "one"])
    assert list(means.items()) == [("two", 1.0), ("one", 0.25)]


def test_mean_of_categories_by_hand():
    # Three images of category a (mean 1), one prompt of b right and one wrong: (1 + 1/2) / 2, not 4/5.
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    categories = ["a", "a", "a", "b", "b"]
    found = mean_of_categories(values, ["p", "p", "q", "r", "s"], categories, seed=0, resamples=20_000)
    assert found.mean == 0.75
    assert (found.low, found.high) == (0.5, 1.0)  # b is 0, 1/2 or 1; a does not vary
    assert found.std_error == pytest.approx(math.sqrt(1 / 8) / 2, abs=0.005)
    assert (found.clusters, found.values) == (4, 5)


def test_mean_of_categories_draws_each_category_from_itself():
    # Without the strata a draw could hold one category only, and categories that differ would widen the interval.
    values = torch.cat([torch.zeros(20), torch.ones(20)])
    found = mean_of_categories(values, range(40), ["a"] * 20 + ["b"] * 20, seed=0)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    single = mean_of_categories(torch.tensor([1.0, 0.0, 1.0]), [0, 1, 2], ["a", "a", "b"], seed=0)
    assert single.mean == 0.75
    assert math.isnan(single.low)
    with pytest.raises(ValueError, match="'p' is in 'a' and in 'b'"):
        mean_of_categories(torch.ones(2), ["p", "p"], ["a", "b"], seed=0)
    with pytest.raises(ValueError, match="1 categories for 2 values"):
        mean_of_categories(torch.ones(2), ["p", "q"], ["a"], seed=0)


def test_any_of_cluster_by_hand():
    best, names = any_of_cluster(torch.tensor([0.0, 1.0, 0.0, 0.0]), ["p", "p", "q", "q"])
    assert (best.tolist(), names) == ([1.0, 0.0], ["p", "q"])


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        (torch.tensor([]), [], "0 values"),
        (torch.tensor([1.0, float("nan")]), [0, 1], "1 of 2 values are NaN"),
        (torch.tensor([1.0]), [0, 1], r"shape \[1\] with 2 labels"),
        (torch.ones(2, 2), [0, 1], r"shape \[2, 2\] with 2 labels"),
    ],
)
def test_refusals(values, clusters, message):
    with pytest.raises(ValueError, match=message):
        clustered_mean(values, clusters, seed=0)
    with pytest.raises(ValueError, match=message):
        category_means(values, clusters)


def test_more_refusals():
    with pytest.raises(ValueError, match=r"\[2\] values after, \[3\] before"):
        paired_difference(torch.ones(2), torch.ones(3), [0, 1], seed=0)
    with pytest.raises(ValueError, match="confidence=95"):
        clustered_mean(torch.ones(2), [0, 1], seed=0, confidence=95)


# ------------------------------------------------------------------------------------- prompts that are all there are


def test_fixed_prompts_by_hand():
    # Category a: prompts p (0, 1) and q (1, 1, 1); category b: r (0, 1). Unbiased variances 1/2, 0 and 1/2.
    values, names = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0]), ["p", "p", "q", "q", "q", "r", "r"]
    found = mean_of_fixed_prompts(values, names, ["a"] * 5 + ["b"] * 2)
    assert found.mean == pytest.approx((4 / 5 + 1 / 2) / 2)
    parts = [2 * 0.5 / (2 * 5) ** 2, 2 * 0.5 / (2 * 2) ** 2]
    assert found.std_error == pytest.approx(math.sqrt(sum(parts)))
    freedom = sum(parts) ** 2 / (parts[0] ** 2 + parts[1] ** 2)
    assert found.high - found.mean == pytest.approx(t.ppf(0.975, freedom) * found.std_error)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert (found.clusters, found.values) == (3, 7)


def test_fixed_prompts_with_one_image_each_are_one_stratum_and_never_narrower():
    ones = mean_of_fixed_prompts(torch.tensor([0.0, 1.0, 1.0, 0.0]), ["p", "q", "r", "s"], ["a"] * 4)
    assert ones.std_error == pytest.approx(math.sqrt(torch.tensor([0.0, 1.0, 1.0, 0.0]).var().item() / 4))
    # A lone one is compared with all the others of its category; where there are none, nothing is known.
    lone = mean_of_fixed_prompts(torch.tensor([1.0, 1.0, 0.0]), ["p", "p", "q"], ["a"] * 3)
    assert lone.std_error == pytest.approx(math.sqrt((1 / 3) / 3))
    none = mean_of_fixed_prompts(torch.tensor([1.0, 0.0, 1.0]), ["p", "p", "q"], ["a", "a", "b"])
    assert none.mean == 0.75
    assert math.isnan(none.low)
    assert math.isnan(none.std_error)
    same = mean_of_fixed_prompts(torch.ones(4), ["p", "p", "q", "q"], ["a"] * 4)
    assert (same.low, same.mean, same.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="mean_of_fixed_prompts: 'p' is in 'a' and in 'b'"):
        mean_of_fixed_prompts(torch.ones(2), ["p", "p"], ["a", "b"])


@pytest.mark.parametrize("count", [96, 480])
@pytest.mark.parametrize("paired", [False, True], ids=["mean", "gain"])
def test_coverage_on_the_shipped_prompts(count, paired):
    """Each prompt has its own rate of success, as a model has; an evaluation draws every image anew."""
    prompts = ShapesTask().eval_prompts(count)
    texts, categories = [p.text for p in prompts], [p.category for p in prompts]
    random = torch.Generator().manual_seed(0)
    rates = {text: torch.rand((), generator=random).item() for text in dict.fromkeys(texts)}
    before = torch.tensor([rates[text] for text in texts]) * 0.8
    after = torch.tensor([min(1.0, 0.1 + rates[text] ** 0.5) for text in texts])
    expected = after - before if paired else before
    truth = mean_of_fixed_prompts(expected, texts, categories).mean
    hits, widths, old = 0, [], []
    for trial in range(400):
        noise = torch.rand(count, generator=random)  # the same for both: what is easy for one is easier for the other
        right = (noise < before).double()
        values = (noise < after).double() - right if paired else right
        found = mean_of_fixed_prompts(values, texts, categories)
        hits += found.low <= truth <= found.high
        widths.append(found.high - found.low)
        if trial < 5:
            wide = clustered_mean(values, texts, seed=trial, resamples=500)
            old.append(wide.high - wide.low)
    assert 0.92 <= hits / 400 <= 0.98
    if (count, paired) == (480, False):  # an interval over prompts would be more than twice as wide
        assert sum(old) / 5 > 2 * sum(widths) / 400
