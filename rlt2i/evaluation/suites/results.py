"""What an evaluation came to: means with intervals over prompts, differences to another evaluation, diversity."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.evaluation.health import mean_cosine_distance, pixel_features, vendi_score
from rlt2i.evaluation.statistics import (
    Interval,
    any_of_cluster,
    clustered_mean,
    mean_of_categories,
    mean_of_fixed_prompts,
    paired_difference,
)
from rlt2i.evaluation.suites.folder import EvaluationError, Folder, Record, check_complete, scores_of
from rlt2i.evaluation.suites.suite import PIXELS, drawing_id
from rlt2i.vision.patch_features import patch_features

SCORE = "score"
"""Name of what a reward returns, beside its components."""

_IMAGES_PER_PASS = 64


@attrs.frozen(kw_only=True)
class Measure:
    """One number of an evaluation.

    Attributes:
        mean: with its interval; None where no image has a value.
        categories: category -> the same.
        any_of: share of prompts of which any image is right, where the values are right (1) and wrong (0) and there
            are several images of each prompt.
        before: mean of the other evaluation over the images that have a value in both.
        gain: mean of the paired differences to it.
        unseen: the mean over the prompts that are not trained on, where the others are known to be.
    """

    mean: Interval | None
    categories: Mapping[str, Interval] = attrs.field(factory=dict)
    any_of: Interval | None = None
    before: float | None = None
    gain: Interval | None = None
    unseen: Interval | None = None


@attrs.frozen(kw_only=True)
class Judged:
    """What one reward said of all images.

    Attributes:
        invalid: images that it could not judge; they are in no mean.
        reasons: reason -> how many.
        measures: "score" and the components.
    """

    invalid: int
    reasons: Mapping[str, int]
    measures: Mapping[str, Measure]


def merged(folder: Folder, count: int, images_per_prompt: int, rewards: Sequence[str]) -> list[dict[str, Any]]:
    """Every image with all that was said of it, by id.

    Raises:
        EvaluationError: unless each id is there exactly once, among the images and among the scores of each reward.
    """
    wanted = [drawing_id(number, index) for number in range(count) for index in range(images_per_prompt)]
    drawn = folder.records("images")
    check_complete(drawn, wanted, f"{folder.path}, images")
    rows = [{**drawn[name], "scores": {}} for name in wanted]
    for reward in rewards:
        scores = folder.records(scores_of(reward))
        check_complete(scores, wanted, f"{folder.path}, scores of {reward}")
        for row in rows:
            row["scores"][reward] = {k: v for k, v in scores[row["id"]].items() if k != "id"}
    return rows


def write_results(rows: Sequence[Record]) -> str:
    """The rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def judged(rows: Sequence[Record], reward: str, *, overall: str, before: Sequence[Record] | None = None) -> Judged:
    """Statistics of one reward.

    Args:
        rows: of this evaluation.
        overall: "images" or "categories", see `Suite`.
        before: rows of the evaluation to compare with; the same prompts and noise, in the same order.
    """
    said = [row["scores"][reward] for row in rows]
    reasons = collections.Counter(entry["reason"] for entry in said if entry[SCORE] is None)
    components = dict.fromkeys(part for entry in said for part in entry.get("components", ()))
    compared = before if before is not None and all(reward in row["scores"] for row in before) else None

    def measure(part: str) -> Measure:
        def value(row: Record) -> float | None:
            entry = row["scores"][reward]
            number: float | None = entry[SCORE] if part == SCORE else entry.get("components", {}).get(part)
            return number

        return measured(rows, value, overall=overall, before=compared)

    return Judged(
        invalid=sum(reasons.values()),
        reasons=dict(reasons.most_common()),
        measures={part: measure(part) for part in (SCORE, *components)},
    )


def measured(
    rows: Sequence[Record],
    value: Callable[[Record], float | None],
    *,
    overall: str,
    before: Sequence[Record] | None = None,
) -> Measure:
    """Statistics of one value per image; None is left out, and from both sides of a pair."""
    kept = [(row, number) for row in rows if (number := value(row)) is not None]
    if not kept:
        return Measure(mean=None)
    values = torch.tensor([number for _, number in kept], dtype=torch.float64)
    prompts = [row["prompt"] for row, _ in kept]
    categories = [row["category"] for row, _ in kept]
    by_category: dict[str, Interval] = {}
    if len(set(categories)) > 1:
        for category in dict.fromkeys(categories):
            own = [i for i, name in enumerate(categories) if name == category]
            by_category[category] = _overall(values[torch.tensor(own)], [kept[i][0] for i in own], "images")
    any_of = None
    if len(kept) > len(set(prompts)) and set(values.tolist()) <= {0.0, 1.0}:
        best, names = any_of_cluster(values, prompts)
        any_of = clustered_mean(best, names, seed=0)
    gain, mean_before = None, None
    if before is not None:
        pairs = [
            (row, a, b)
            for row, old in zip(rows, before, strict=True)
            if (a := value(row)) is not None and (b := value(old)) is not None
        ]
        if pairs:
            now = torch.tensor([a for _, a, _ in pairs], dtype=torch.float64)
            then = torch.tensor([b for _, _, b in pairs], dtype=torch.float64)
            paired = [row for row, _, _ in pairs]
            gain = _overall(now - then, paired, overall)
            mean_before = _overall(then, paired, overall).mean
    unseen = [i for i, (row, _) in enumerate(kept) if not row.get("trained_on")]
    separate = bool(unseen) and len(unseen) < len(kept)
    return Measure(
        mean=_overall(values, [row for row, _ in kept], overall),
        unseen=_overall(values[torch.tensor(unseen)], [kept[i][0] for i in unseen], overall) if separate else None,
        categories=by_category,
        any_of=any_of,
        before=mean_before,
        gain=gain,
    )


def _overall(values: Tensor, rows: Sequence[Record], overall: str) -> Interval:
    prompts = [row["prompt"] for row in rows]
    if all(row.get("fixed") for row in rows):
        categories = [row["category"] if overall == "categories" else "all" for row in rows]
        return mean_of_fixed_prompts(values, prompts, categories)
    if overall == "images":
        return clustered_mean(values, prompts, seed=0)
    return mean_of_categories(values, prompts, [row["category"] for row in rows], seed=0)


def health(rows: Sequence[Record], before: Sequence[Record] | None) -> dict[str, Measure]:
    """What was measured of the images without any reward; means over images, whatever the suite's score is."""
    names = dict.fromkeys(name for row in rows for name in row["health"])
    return {
        name: measured(rows, lambda row, name=name: row["health"].get(name), overall="images", before=before)  # type: ignore[misc]
        for name in names
    }


def diversity(
    folder: Folder, rows: Sequence[Record], images_per_prompt: int, features: str, device: torch.device
) -> dict[str, Tensor]:
    """How much the images of one prompt differ: "cosine_distance" and "vendi", [prompts] each.

    Args:
        rows: prompt by prompt.
        features: see `Suite.features`.

    Raises:
        ValueError: with one image per prompt.
    """
    described = [
        describe(folder.read_images(rows[start : start + _IMAGES_PER_PASS]).to(device), features).cpu()
        for start in range(0, len(rows), _IMAGES_PER_PASS)
    ]
    vectors = torch.cat(described)
    return {
        "cosine_distance": mean_cosine_distance(vectors, images_per_prompt),
        "vendi": vendi_score(vectors, images_per_prompt),
    }


def describe(images: Tensor, features: str) -> Tensor:
    """[N, D] features of [N, 3, H, W] uint8 images: averaged pixels, or the mean patch token of a transformer."""
    if features == PIXELS:
        return pixel_features(images)
    return patch_features(images, features).mean(dim=(1, 2))


def diversity_measures(
    now: Mapping[str, Tensor], before: Mapping[str, Tensor] | None, prompts: Sequence[str]
) -> dict[str, Measure]:
    """Means over prompts, with their differences."""
    measures = {}
    for name, values in now.items():
        then = before[name] if before is not None else None
        measures[name] = Measure(
            mean=clustered_mean(values, prompts, seed=0),
            before=None if then is None else float(then.double().mean()),
            gain=None if then is None else paired_difference(values, then, prompts, seed=0),
        )
    return measures


def check_pairs(record: Record, other: Record, path: object) -> list[str]:
    """Whether two evaluations can be paired, by their fingerprints.

    Returns:
        What else differs besides the weights, in words for the report.

    Raises:
        EvaluationError: when prompts or noise differ.
    """
    keys = ("name", "version", "seed", "prompts_sha256", "images_per_prompt")
    different = [key for key in keys if record["suite"][key] != other["suite"][key]]
    if different:
        listed = ", ".join(
            f"{key} is {other['suite'][key]!r} there and {record['suite'][key]!r} here" for key in different
        )
        raise EvaluationError(
            f"{path}: cannot be compared image by image: {listed}. Evaluate the other weights with the same suite and "
            "the same --prompts."
        )
    notes = [
        f"{key} {other['suite'][key]} there, {record['suite'][key]} here"
        for key in ("steps", "image_size")
        if record["suite"][key] != other["suite"][key]
    ]
    changed = sorted(
        key for key in {*record["policy"], *other["policy"]} if record["policy"].get(key) != other["policy"].get(key)
    )
    notes += [f"policy.{key} {other['policy'].get(key)!r} there, {record['policy'].get(key)!r} here" for key in changed]
    if record["made_with"] != other["made_with"]:
        notes.append("drawn with other libraries or on another device")
    return notes
