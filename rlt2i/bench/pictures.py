"""What the arms of a benchmark drew from the same noise, and where their credit lay, for its page.

Only of plans that keep their runs (`keep_runs`): tables hold no images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from rlt2i.bench.folder import BenchFolder
from rlt2i.bench.measures import judged_places
from rlt2i.bench.plan import Plan
from rlt2i.evaluation.heldout import Evaluation
from rlt2i.interfaces import RewardBatch
from rlt2i.recipes.recipe import Recipe
from rlt2i.report.gallery import FRAMES, embedded
from rlt2i.report.maps import overlay, scale_end, scale_top, spread
from rlt2i.report.rundir import PASS, has_pass_mark
from rlt2i.runs.artifacts import MapSample, evaluation_file, maps_file, open_maps

SHOWN = 12
"""Prompts whose images are shown: the first ones, whatever came of them."""
_STEPS, _FACTOR = 2, 3


def kept_pictures(folder: BenchFolder, plan: Plan) -> Mapping[str, Any] | None:
    """What the page shows of the runs at the plan's first seed; None where fewer than two arms kept theirs."""
    seed = plan.first_seed
    runs = {arm: folder.trial(arm, seed) / "run" for arm in plan.arms}
    last = plan.recipe(plan.reference).train.iterations
    arms = [arm for arm, run in runs.items() if folder.finished(arm, seed) and evaluation_file(run, last).is_file()]
    if len(arms) < 2:
        return None
    recipe = folder.recipe(arms[0], seed)
    prompts = recipe.task.eval_prompts(recipe.train.eval_prompts)
    files = {"base": folder.base} | {arm: evaluation_file(runs[arm], last) for arm in arms}
    judged = {name: Evaluation.read(file, prompts).unseen() for name, file in files.items()}
    labels = {"base": "base"} | {arm: plan.label(arm) for arm in arms}
    return {
        "seed": seed,
        "gallery": _gallery(recipe, plan.metric, judged, labels),
        "counts": _counts(plan, judged),
        "maps": _maps(recipe, {plan.label(arm): maps_file(runs[arm], 1) for arm in arms}),
    }


# ---------------------------------------------------------------------------------------------------------- images


def _gallery(
    recipe: Recipe, metric: str, judged: Mapping[str, Evaluation], labels: Mapping[str, str]
) -> list[Mapping[str, Any]]:
    """One entry a prompt: the images of all arms, framed by their verdict, the judged places outlined."""
    base = judged["base"]
    first = list({prompt.text: row for row, prompt in reversed(list(enumerate(base.prompts)))}.values())
    rows = sorted(first)[:SHOWN]
    inside = judged_places(base, recipe.reward)[rows] if "maps" in recipe.reward.offers else None
    pictures: list[Mapping[str, Any]] = []
    for i, row in enumerate(rows):
        images: list[Mapping[str, Any]] = []
        for name, evaluation in judged.items():
            passes = _passes(evaluation, metric)
            verdict = None if passes is None else bool(passes[row])
            picture = outlined(evaluation.images[row], None if inside is None else inside[i] > 0.5)
            sign = {True: ", right", False: ", wrong", None: ""}[verdict]
            alt = f"{labels[name]}: {base.prompts[row].text}{sign}"
            images.append({"label": labels[name], "picture": embedded(picture, alt, style=FRAMES[verdict])})
        pictures.append({"prompt": base.prompts[row].text, "images": images})
    return pictures


def _passes(evaluation: Evaluation, metric: str) -> Tensor | None:
    """[N] bool; None where the metric has no mark to pass."""
    values = evaluation.values(metric)
    return values >= PASS if has_pass_mark(values.tolist()) else None


def _counts(plan: Plan, judged: Mapping[str, Evaluation]) -> list[str]:
    """For each comparison, how many of the same images one arm got right and the other did not."""
    lines = []
    for arm, other in plan.comparisons:
        if arm in judged and other in judged:
            a, b = (_passes(judged[name], plan.metric) for name in (arm, other))
            if a is not None and b is not None:
                only, others = int((a & ~b).sum()), int((b & ~a).sum())
                lines.append(
                    f"{plan.label(arm)} against {plan.label(other)}: of the same {len(a)} prompts and noises "
                    f"{only} are right in the first alone, {others} in the second alone."
                )
    return lines


def outlined(image: Tensor, inside: Tensor | None) -> Tensor:
    """The image three times as large, with a black and white line around the judged places.

    Args:
        image: [3, H, W] uint8.
        inside: [H, W] bool, or None for no line.

    Returns:
        [3, 3H, 3W] uint8.
    """
    large = image.repeat_interleave(_FACTOR, -2).repeat_interleave(_FACTOR, -1).clone()
    if inside is None or bool(inside.all()) or not bool(inside.any()):
        return large
    region = inside.repeat_interleave(_FACTOR, -2).repeat_interleave(_FACTOR, -1).float()[None, None]
    inner = -torch.nn.functional.max_pool2d(-region, 3, 1, 1)
    outer = torch.nn.functional.max_pool2d(region, 3, 1, 1)
    large[:, ((region - inner) > 0)[0, 0]] = 0
    large[:, ((outer - region) > 0)[0, 0]] = 255
    return large


# ------------------------------------------------------------------------------------------------------------ maps


def _maps(recipe: Recipe, files: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Maps of the first iteration, when all arms drew the same images: image by image, arm by arm."""
    samples = {arm: open_maps(file) for arm, file in files.items() if file.is_file()}
    if not samples:
        return None
    arms = list(samples)
    shared = [i for i, s in enumerate(samples[arms[0]]) if all(_same(s, samples[arm], i) for arm in arms)]
    steps = spread(len(samples[arms[0]][0].weights), _STEPS + 1)[:_STEPS]
    every = [s.weights[steps] for arm in arms for s in samples[arm]]
    top = scale_top(torch.cat([weights.flatten() for weights in every]))
    inside = _judged(recipe, [samples[arms[0]][i] for i in shared])
    shares: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    members: list[Mapping[str, Any]] = []
    for place, i in enumerate(shared):
        sample, region = samples[arms[0]][i], None if inside is None else inside[place]
        plain = embedded(outlined(sample.final, region), sample.prompt)
        pictures: list[Mapping[str, Any]] = [{"label": "image", "picture": plain}]
        for arm in arms:
            weights = samples[arm][i].weights
            if region is not None:
                shares[arm].append([share_inside(w, region) for w in weights[steps]])
            for step in steps:
                over = outlined(overlay(sample.final, weights[step], top=top), region)
                label = f"{arm}, step {step}"
                pictures.append({"label": label, "picture": embedded(over, f"{label}: {sample.prompt}")})
        members.append({"prompt": sample.prompt, "images": pictures})
    return {
        "members": members,
        "end": scale_end(top, max(float(weights.max()) for weights in every)),
        "uniform": f"{100 / top:.1f}",
        "area": None if inside is None or not len(inside) else float(inside.float().mean()),
        "shares": [
            (arm, *(f"{sum(row[k] for row in rows) / len(rows):.0%}" for k in range(len(steps))))
            for arm, rows in shares.items()
            if rows
        ],
        "step_names": [f"step {step}" for step in steps],
    }


def _same(sample: MapSample, others: Sequence[MapSample], i: int) -> bool:
    return i < len(others) and torch.equal(sample.final, others[i].final)


def _judged(recipe: Recipe, samples: Sequence[MapSample]) -> Tensor | None:
    """[M, H, W] bool: where the reward looks in the images of the first iteration; None where it does not say."""
    if "maps" not in recipe.reward.offers or not samples:
        return None
    train = recipe.train
    drawn = recipe.task.train_prompts(seed=train.seed, start=0, count=train.prompts_per_iteration)
    metadata = {prompt.text: prompt.metadata for prompt in drawn}
    batch = RewardBatch(
        images=torch.stack([s.final for s in samples]),
        prompts=[s.prompt for s in samples],
        metadata=[metadata[s.prompt] for s in samples],
    )
    maps = recipe.reward.score(batch, frozenset({"maps"})).maps
    assert maps is not None, "the reward offers maps"
    return interpolate(maps[:, None].float(), size=tuple(batch.images.shape[-2:]), mode="area")[:, 0] > 0.5


def share_inside(weights: Tensor, inside: Tensor) -> float:
    """Share of the weight [h, w] that lies within a region [H, W] of the image, in [0, 1]."""
    area = interpolate(inside[None, None].float(), size=tuple(weights.shape), mode="area")[0, 0]
    return float((weights * area).sum() / weights.sum().clamp_min(1e-12))
