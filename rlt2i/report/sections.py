"""The sections of the report that are made of numbers and text: what the templates say, in values."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from rlt2i.report.charts import Series, line_chart
from rlt2i.report.numbers import count, seconds, short, signed, two
from rlt2i.report.rundir import EvalImages, Row, Run, column
from rlt2i.report.summary import Headline, categories, metric_name, outcomes

_TITLES = {
    "grad_norm": "Gradient norm",
    "loss/total": "Loss",
    "clip/high": "Share of ratios clipped above",
    "clip/low": "Share of ratios clipped below",
    "kl/base": "Distance from the base",
    "map/effective_support": "Spread of the maps",
    "reward/spread": "Reward, spread within a group",
    "diversity/vendi": "Diversity within a group (Vendi score)",
    "diversity/cosine_distance": "Diversity within a group (cosine)",
    "kl/reference": "Penalised distance from the reference",
    "kl/old": "KL divergence from the old policy",
    "kl/old_max": "KL divergence from the old policy, largest",
    "kl/old_v": "Distance from the old policy's velocity",
    "ratio/abs_minus_one_max": "Largest |ratio − 1|",
    "ratio/abs_log": "Mean |log ratio|",
    "map/entropy": "Entropy of the maps",
    "map/max": "Largest weight of a map",
    "time/entropy": "Entropy of the weights over steps",
    "time/effective_support": "Spread of the weights over steps",
    "time/max": "Largest weight of a step",
    "informative": "Share of rollouts with an advantage",
    "reward/tied_groups": "Share of tied groups",
    "rewards/invalid": "Share of images without a score",
}
"""Plain names; the first ones that changed are shown first."""
_FIRST = 6
_ELSEWHERE = ("step", "reward/mean", "seconds/", "eval/", "health/")
"""Metrics of a training row that other sections show."""


def two_sizes(series: Sequence[Series], *, width: int, height: int, **options: Any) -> Mapping[str, str]:
    """A chart drawn for a desk and for a phone: shrinking the wide one would make its text unreadable."""
    return {
        "wide": line_chart(series, width=width, height=height, **options),
        "narrow": line_chart(series, width=340, height=250, **options),
    }


def top(run: Run, head: Headline) -> Mapping[str, Any]:
    """The result and the most important numbers."""
    last_step = max((row["step"] for row in (*run.train, *run.evals)), default=0)
    bounds = head.gain.bounds
    firm = bounds.replace(" ", "\u00a0")  # an interval does not break across lines
    tiles: list[tuple[str, str]] = []
    if math.isfinite(head.before) and head.last > head.first:
        tiles.append((f"{two(head.before)} → {two(head.after)}", f"held-out {metric_name(head.metric)}"))
        if math.isfinite(head.gain.value):
            known = math.isfinite(head.gain.low)
            between = f"paired gain, 95 % interval {firm}" if known else "gain, no interval"
            tiles.append((signed(head.gain.value), between))
    tiles.append((f"{int(last_step)}", count(last_step, "iteration").split()[1]))
    spent = sum(sum(phases.values()) for phases in map(_phases, run.train))
    if spent:
        tiles.append((seconds(spent), "training time, without evaluations"))
    return {"sentence": head.sentence.replace(bounds, firm), "tiles": tiles}


def curve(run: Run, head: Headline) -> Mapping[str, Any]:
    """Held-out scores over the iterations, and the training reward."""
    drawn: dict[str, Any] = {"held_out": None, "reward": None, "banded": False, "smoothed": False}
    if head.metric:
        series = [_series(run.evals, f"eval/{head.metric}")]
        beside = head.metric.replace("unseen/", "seen/") if "/" in head.metric else "partial"
        if head.metric.endswith("strict") and any(f"eval/{beside}" in row for row in run.evals):
            series.append(_series(run.evals, f"eval/{beside}"))
        drawn["banded"] = bool(series[0].low)
        drawn["held_out"] = two_sizes(
            series,
            y_label=f"held-out {metric_name(head.metric)}" if len(series) == 1 else "held-out score",
            reference=(head.before, f"at iteration {head.first}: {two(head.before)}"),
            from_zero=all(0 <= y <= 1 for s in series for y in s.y),
            width=980,
            height=360,
        )
    x, y = column(run.train, "reward/mean")
    if x:
        batches = Series(label="mean of a batch", x=x, y=y, faint=len(x) > 20)
        drawn["smoothed"] = batches.faint
        drawn["reward"] = two_sizes(
            [batches, *_smoothed(x, y)], y_label="reward on training prompts", width=980, height=260
        )
    return drawn


def by_category(run: Run, pair: tuple[EvalImages, EvalImages] | None) -> Mapping[str, Any]:
    """Scores per category, first and last evaluation."""
    rows = []
    for name in categories(run.evals):
        _, values = column(run.evals, f"eval/{name}")
        before, after = values[0], values[-1]
        row = {
            "name": name,
            "before": before,
            "after": after,
            "before_text": two(before),
            "after_text": two(after),
            "change": signed(after - before),
            "is_share": 0 <= before <= 1 and 0 <= after <= 1,
        }
        if pair is not None:
            members = [i for i, c in enumerate(pair[1].categories) if c == name and i < len(pair[0])]
            counts = outcomes(*pair, members)
            row["images"] = str(len(members)) if members else "–"
            row["fixed"], row["broken"] = (counts.fixed, counts.broken) if counts.total else ("–", "–")
        rows.append(row)
    return {"rows": rows, "counted": pair is not None}


def training(run: Run, head: Headline) -> Mapping[str, Any]:
    """All that was logged, one metric a panel with its band; what never changed is text."""
    keys = _metrics(run.train, _ELSEWHERE)
    judged = (f"eval/{head.metric}", "eval/images", *(f"eval/{name}" for name in categories(run.evals)), "seconds/")
    held_out = [key for key in _metrics(run.evals, ("step",)) if not key.startswith("seconds/") and key not in judged]
    order = {key: place for place, key in enumerate(_TITLES)}
    keys.sort(key=lambda key: order.get(key, len(order)))
    changing = [key for key in keys if not _constant(run.train, key)]
    moving = [key for key in held_out if not _constant(run.evals, key)]
    more = [
        ("More metrics of training", [_panel(run.train, key) for key in changing[_FIRST:]]),
        ("Other metrics of the evaluations", [_panel(run.evals, key) for key in moving]),
    ]
    still = [(run.train, key) for key in keys if key not in changing]
    still += [(run.evals, key) for key in held_out if key not in moving]
    return {
        "panels": [_panel(run.train, key) for key in changing[:_FIRST]],
        "more": [(title, panels) for title, panels in more if panels],
        "constants": [(key, short(column(rows, key)[1][-1])) for rows, key in still],
    }


def _metrics(rows: Sequence[Row], elsewhere: tuple[str, ...]) -> list[str]:
    """Metrics with a panel of their own: neither the bounds of another one nor its values at single steps."""
    keys = dict.fromkeys(key for row in rows for key in row if not key.startswith(elsewhere))
    bounds = {f"{key}_{side}" for key in keys for side in ("low", "high")}
    return [key for key in keys if key not in bounds and not ("@" in key and key.partition("@")[0] in keys)]


def _variants(rows: Sequence[Row], key: str) -> list[str]:
    return [other for other in dict.fromkeys(k for row in rows for k in row) if other.startswith(f"{key}@")]


def _constant(rows: Sequence[Row], key: str) -> bool:
    """Whether a metric and its values at single steps stay the same up to rounding."""
    for name in (key, *_variants(rows, key)):
        values = [v for v in column(rows, name)[1] if math.isfinite(v)]
        if values and max(values) - min(values) > 1e-6 * max(map(abs, values)):
            return False
    return True


def _panel(rows: Sequence[Row], key: str) -> str:
    variants = _variants(rows, key)
    lines = [attrs.evolve(_series(rows, name), faint=name != key, colour=0) for name in (*variants, key)]
    title = _TITLES.get(key, key.removeprefix("eval/").replace("_", " ").replace("/", ": ").capitalize())
    note = f"{key}; thin: single steps" if variants else key
    return line_chart(lines, title=title, y_label=note, width=340, height=220)


def timing(run: Run) -> Mapping[str, Any]:
    """Where the time went."""
    totals: dict[str, list[float]] = {}
    for row in run.train:
        for phase, spent in _phases(row).items():
            totals.setdefault(phase, []).append(spent)
    whole = sum(map(sum, totals.values())) or 1.0
    rows = [
        {
            "phase": phase,
            "share": f"{sum(values) / whole:.4f}",
            "cells": [
                seconds(sum(values)),
                f"{100 * sum(values) / whole:.0f} %",
                seconds(sum(values) / len(values)),
                seconds(sorted(values)[len(values) // 2]),
            ],
        }
        for phase, values in totals.items()
    ]
    judging = sum(v for v in column(run.evals, "seconds/eval")[1] if math.isfinite(v))
    done = f"{seconds(whole)} in {count(len(run.train), 'iteration')}, {seconds(whole / max(1, len(run.train)))} each."
    rest = f"{count(len(run.evals), 'evaluation')} took another {seconds(judging)}." if judging else ""
    return {"rows": rows, "sentence": f"{done} {rest or 'Evaluations are not counted.'}"}


def _phases(row: Row) -> dict[str, float]:
    """Seconds of an iteration by phase; an evaluation that fell on it is no part of training."""
    return {
        key.removeprefix("seconds/"): value
        for key, value in row.items()
        if key.startswith("seconds/") and key not in ("seconds/total", "seconds/eval") and math.isfinite(value)
    }


def ending(run: Run) -> Mapping[str, Any]:
    """How to use and to repeat the run."""
    command = run.versions.get("command")
    if isinstance(command, list):
        command = shlex.join(str(word) for word in command)
    return {
        "use": _use(run),
        "versions": [(key, value) for key, value in _flat(run.versions) if key != "command"],
        "command": command if isinstance(command, str) else "",
        "checkpoints": count(len(run.checkpoints), "checkpoint"),
    }


def _use(run: Run) -> Mapping[str, str] | None:
    """How to draw with the run, and how to load the newest export, whichever of the three forms it has."""
    folder = run.path / "checkpoints" if (run.path / "checkpoints").is_dir() else run.path
    exports = [folder / name / "export" for name in run.checkpoints if any((folder / name / "export").glob("*"))]
    if not exports:
        return None
    shown = Path(shlex.split(shown_path(run))[0]) / exports[-1].relative_to(run.path)
    export = shown.as_posix()
    policy = run.recipe.get("policy")
    base = policy.get("path", "BASE MODEL") if isinstance(policy, dict) else "BASE MODEL"
    if (exports[-1] / "model_index.json").is_file():
        load = f'pipeline = DiffusionPipeline.from_pretrained("{export}")'
    elif list(exports[-1].glob("*.safetensors")):
        load = f'pipeline = DiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights("{export}")'
    else:
        network = next(p.name for p in sorted(exports[-1].iterdir()) if p.is_dir())
        load = (
            f'{network} = AutoModel.from_pretrained("{export}", subfolder="{network}")\n'
            f'pipeline = DiffusionPipeline.from_pretrained("{base}", {network}={network})'
        )
    names = "AutoModel, DiffusionPipeline" if "AutoModel" in load else "DiffusionPipeline"
    card = exports[-1] / "README.md"
    return {
        "sample": f'rlt2i sample {shown_path(run)} --prompt "..."',
        "code": f"from diffusers import {names}\n\n{load}",
        "card": f"{export}/{card.name}" if card.is_file() else "",
    }


def shown_path(run: Run) -> str:
    """The run directory as a reader may type it: as given, but never where it lay on the writer's machine."""
    return shlex.quote(run.path.name if run.path.is_absolute() else run.path.as_posix())


def _series(rows: Sequence[Row], key: str) -> Series:
    """A metric with its band, where both bounds were logged with it."""
    x, y = column(rows, key)
    low, high = column(rows, f"{key}_low")[1], column(rows, f"{key}_high")[1]
    complete = len(low) == len(high) == len(y)
    label = metric_name(key.removeprefix("eval/"))
    return Series(label=label, x=x, y=y, low=low if complete else (), high=high if complete else ())


def _smoothed(x: Sequence[float], y: Sequence[float]) -> list[Series]:
    """Centred running mean, for runs long enough to need one."""
    if len(x) <= 20:
        return []
    reach = max(2, len(x) // 40)
    windows = [[v for v in y[max(0, i - reach) : i + reach + 1] if math.isfinite(v)] for i in range(len(y))]
    means = [sum(window) / len(window) if window else math.nan for window in windows]
    return [Series(label="running mean", x=x, y=means, colour=0)]


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows
