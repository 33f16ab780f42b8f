"""Means of scores with honest intervals: what an interval is over depends on where the prompts come from.

Prompts that stand for others which might have been drawn: prompts, not images, are resampled. With m images per prompt
and an intra-prompt correlation r, an interval over images would be too narrow by a factor of sqrt(1 + (m - 1) r).
scipy's bootstrap resamples single values only.

Prompts that are all there are (the few combinations of an embedded world): they would be the same in any repetition,
and what varies is the noise of their images. An interval over prompts would be two to three times too wide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import attrs
import torch
from torch import Tensor

from rlt2i.seeds import generator

_CHUNK = 1 << 22


@attrs.frozen(kw_only=True)
class Interval:
    """A mean and a bootstrap interval around it.

    Attributes:
        mean: of the values, in their unit.
        low, high: the percentile interval; nan for a single cluster, which says nothing about others.
        std_error: standard deviation of the resampled means; nan for a single cluster.
        clusters, values: how many there were.
    """

    mean: float
    low: float
    high: float
    std_error: float
    clusters: int
    values: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def clustered_mean(
    values: Tensor,
    clusters: Sequence[Hashable],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Mean with a cluster-bootstrap percentile interval.

    C clusters are drawn with replacement out of C, `resamples` times; each draw's mean is the sum of its
    values over their number, so larger clusters weigh more, as they do in the mean itself. The bounds are the
    (1 - confidence) / 2 quantiles from both ends, interpolated linearly.

    Args:
        values: [N] finite; drop invalid scores first.
        clusters: N prompts (texts or numbers); equal ones belong together.
        seed: the draw is a function of it, of the number of clusters and of `resamples`.
        confidence: in (0, 1).
        resamples: number of draws.

    Raises:
        ValueError: on no values, values that are not finite, or lengths that differ.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence={confidence}, resamples={resamples}: use 0 < confidence < 1, resamples >= 1.")
    values = _checked(values, clusters)
    low, high, std_error = _bounds(
        _resampled_means(values, clusters, generator("bootstrap", seed), resamples), confidence
    )
    return Interval(
        mean=values.mean().item(),
        low=low,
        high=high,
        std_error=std_error,
        clusters=len(set(clusters)),
        values=len(values),
    )


def mean_of_categories(
    values: Tensor,
    clusters: Sequence[Hashable],
    categories: Sequence[Hashable],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Mean of the categories' means, GenEval's overall score, with a cluster-bootstrap percentile interval.

    The clusters of each category are drawn among themselves (a stratified bootstrap), so every draw weighs the
    categories alike, as the score does.

    Args:
        values, clusters, seed, confidence, resamples: see `clustered_mean`.
        categories: N labels; all values of a cluster are of one category.

    Returns:
        The bounds are nan when a category has a single cluster: then nothing says how much it would vary.

    Raises:
        ValueError: as `clustered_mean`, or for a cluster in two categories.
    """
    values = _checked(values, clusters)
    members = _members(clusters, categories, len(values), "mean_of_categories")
    means, draws = [], []
    for number, rows in enumerate(members.values()):
        inside = [clusters[row] for row in rows]
        means.append(values[torch.tensor(rows)].mean())
        draws.append(
            _resampled_means(values[torch.tensor(rows)], inside, generator("bootstrap", seed, number), resamples)
        )
    low, high, std_error = _bounds(torch.stack(draws).mean(dim=0), confidence)
    return Interval(
        mean=torch.stack(means).mean().item(),
        low=low,
        high=high,
        std_error=std_error,
        clusters=len(set(clusters)),
        values=len(values),
    )


def mean_of_fixed_prompts(
    values: Tensor, clusters: Sequence[Hashable], categories: Sequence[Hashable], *, confidence: float = 0.95
) -> Interval:
    """Mean of the categories' means over a list of prompts that is always the same, with an interval over their images.

    A stratified sample, prompts being the strata (Cochran, Sampling Techniques, 5.3): with n_p values of prompt p,
    their unbiased variance s_p^2, N_c values of category c and K categories, var = sum_p n_p s_p^2 / (K N_c)^2. The
    interval is that of Student's t with Satterthwaite's degrees of freedom. Prompts with a single image tell no
    variance: those of a category are taken together as one stratum, which makes the interval wider, not narrower.

    Args:
        values, clusters, confidence: see `clustered_mean`.
        categories: N labels; all values of a cluster are of one category.

    Returns:
        The bounds are nan when a category has a single image.

    Raises:
        ValueError: as `mean_of_categories`.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: use 0 < confidence < 1.")
    values = _checked(values, clusters)
    members = _members(clusters, categories, len(values), "mean_of_fixed_prompts")
    means, shares, freedoms = [], [], []
    for rows in members.values():
        inside = values[torch.tensor(rows)]
        member = torch.tensor(_strata([clusters[row] for row in rows]))
        sizes = torch.bincount(member).double()
        centre = torch.zeros_like(sizes).index_add(0, member, inside) / sizes
        spread = torch.zeros_like(sizes).index_add(0, member, (inside - centre[member]).square()) / (sizes - 1)
        means.append(inside.mean())
        shares.append(sizes * spread / (len(members) * len(rows)) ** 2)
        freedoms.append(sizes - 1)
    share, mean = torch.cat(shares), float(torch.stack(means).mean())
    variance, squares = float(share.sum()), float((share.square() / torch.cat(freedoms)).sum())
    error = variance**0.5
    reach = _student(confidence, variance**2 / squares) * error if squares != 0 else 0.0
    return Interval(
        mean=mean,
        low=mean - reach,
        high=mean + reach,
        std_error=error,
        clusters=len(set(clusters)),
        values=len(values),
    )


def _strata(clusters: Sequence[Hashable]) -> list[int]:
    """Which stratum each image of a category is in: its prompt's; prompts with a single image share one, and a lone one
    of these is taken together with all the others."""
    sizes = Counter(clusters)
    single = object()
    names = [cluster if sizes[cluster] > 1 else single for cluster in clusters]
    if names.count(single) == 1:
        return [0] * len(names)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


def any_of_cluster(values: Tensor, clusters: Sequence[Hashable]) -> tuple[Tensor, list[Hashable]]:
    """The largest value of each cluster: of right and wrong (1 and 0), whether any image of a prompt is right.

    Returns:
        [C], and the C clusters in order of first appearance.
    """
    values = _checked(values, clusters)
    best: dict[Hashable, float] = {}
    for cluster, value in zip(clusters, values.tolist(), strict=True):
        best[cluster] = max(value, best.get(cluster, value))
    return torch.tensor(list(best.values()), dtype=torch.float64), list(best)


def paired_difference(
    after: Tensor,
    before: Tensor,
    clusters: Sequence[Hashable],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Mean of `after - before` over the same prompts and noise, with a cluster-bootstrap interval.

    Much narrower than the difference of two separate intervals, because what a prompt adds to both cancels.

    Args:
        after, before: [N] finite; element i of both is the same prompt and seed under two sets of weights.
        clusters, seed, confidence, resamples: see `clustered_mean`.

    Raises:
        ValueError: as `clustered_mean`, or if the two are not of one length.
    """
    if after.shape != before.shape:
        raise ValueError(
            f"paired_difference: {list(after.shape)} values after, {list(before.shape)} before. Pair the "
            "same prompts and seeds, and drop an image from both when either is invalid."
        )
    difference = after.double() - before.double()
    return clustered_mean(difference, clusters, seed=seed, confidence=confidence, resamples=resamples)


def category_means(values: Tensor, categories: Sequence[Hashable]) -> dict[Hashable, float]:
    """Mean per category, in order of first appearance. GenEval's overall score is the mean of these means.

    Raises:
        ValueError: on no values, values that are not finite, or lengths that differ.
    """
    values = _checked(values, categories)
    rows: dict[Hashable, list[int]] = {}
    for index, name in enumerate(categories):
        rows.setdefault(name, []).append(index)
    return {name: values[torch.tensor(members)].mean().item() for name, members in rows.items()}


def _resampled_means(values: Tensor, clusters: Sequence[Hashable], random: torch.Generator, resamples: int) -> Tensor:
    """[resamples] means of C clusters drawn with replacement out of C; nan for a single cluster."""
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    if len(names) == 1:
        return torch.full((resamples,), float("nan"), dtype=torch.float64)
    member = torch.tensor([names[name] for name in clusters])
    sums = torch.zeros(len(names), dtype=torch.float64).index_add(0, member, values)
    counts = torch.zeros(len(names), dtype=torch.float64).index_add(0, member, torch.ones_like(values))
    means = []
    for start in range(0, resamples, rows := max(1, _CHUNK // len(names))):
        shape = (min(rows, resamples - start), len(names))
        drawn = torch.randint(len(names), shape, generator=random)
        means.append(sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1))
    return torch.cat(means)


def _members(
    clusters: Sequence[Hashable], categories: Sequence[Hashable], count: int, what: str
) -> dict[Hashable, list[int]]:
    """The rows of each category, in order of first appearance."""
    if len(categories) != count:
        raise ValueError(f"{what}: {len(categories)} categories for {count} values.")
    members: dict[Hashable, list[int]] = {}
    home: dict[Hashable, Hashable] = {}
    for row, (cluster, category) in enumerate(zip(clusters, categories, strict=True)):
        members.setdefault(category, []).append(row)
        if home.setdefault(cluster, category) != category:
            raise ValueError(f"{what}: {cluster!r} is in {home[cluster]!r} and in {category!r}.")
    return members


def _student(confidence: float, freedom: float) -> float:
    """Half the width of the interval of a mean, in standard errors."""
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, freedom))


def _bounds(resampled: Tensor, confidence: float) -> tuple[float, float, float]:
    """(low, high, standard error) of resampled means; nan where they are."""
    if resampled.isnan().any():
        return float("nan"), float("nan"), float("nan")
    tail = (1 - confidence) / 2
    bounds = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return bounds[0].item(), bounds[1].item(), resampled.std(correction=0).item()


def _checked(values: Tensor, labels: Sequence[Hashable]) -> Tensor:
    """[N] float64 on the CPU."""
    if values.ndim != 1 or len(values) != len(labels):
        raise ValueError(f"values of shape {list(values.shape)} with {len(labels)} labels: give one label per value.")
    if not len(values):
        raise ValueError("0 values: there is nothing to average. Was every reward invalid?")
    values = values.detach().double().cpu()
    if bad := int((~torch.isfinite(values)).sum()):
        raise ValueError(f"{bad} of {len(values)} values are NaN or infinite. Drop invalid scores before averaging.")
    return values
