"""Measures of a trial that follow from several recorded ones: what the score cost, and whether it can be trusted.

All are computed from the tables, so they can be had of benchmarks that finished long ago.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rlt2i.bench.curves import Curve, Trial, at

Curves = Mapping[str, Mapping[Trial, Curve]]

MEANINGS: Final = {
    "gap/": "hacking gap: gain of the trained reward less that of a judge it was not trained on",
    "gain per nat": "gain of the score over the KL divergence of the sampling path from the base's",
    "gain per drift": "gain of the score over the mean squared change of the velocity",
}
"""Names, or how they begin -> what they are."""


def measures(held_out: Curves, training: Curves, *, metric: str, last: int) -> dict[str, dict[Trial, dict[int, float]]]:
    """The derived measures after the last iteration.

    Args:
        held_out, training: metric -> trial -> iteration -> value. A training value of iteration k is of the weights
            before its update, that is after k - 1.
        metric: the one that decides.
        last: the last iteration.

    Returns:
        name -> trial -> {last: value}; a measure is left out of trials that did not record what it takes.

        "gap/unseen prompts": gain of the reward on training prompts, less its gain on held-out prompts.
        "gap/<judge>": gain of the reward on held-out prompts, less that of a judge on the same images: the plan's
        metric, where it is not the reward itself, and every held-out reward. Judges have scales of their own; arms are
        compared on one and the same judge.
        "gain per nat", "gain per drift": of the plan's metric, where the policy moved at all.
    """
    values: dict[str, dict[Trial, dict[int, float]]] = {}

    def put(name: str, trial: Trial, value: float) -> None:
        values.setdefault(name, {})[trial] = {last: value}

    for trial, curve in held_out.get("reward", {}).items():
        rose = curve[last] - curve[0]
        if means := training.get("reward/mean", {}).get(trial):
            put("gap/unseen prompts", trial, means[last] - means[1] - (at(curve, last - 1) - curve[0]))
        for judge in (*([metric] if metric != "reward" else []), *(n for n in held_out if n.startswith("heldout/"))):
            if judged := held_out[judge].get(trial):
                put(f"gap/{judge.removeprefix('heldout/')}", trial, rose - (judged[last] - judged[0]))
    for trial, curve in held_out[metric].items():
        gain = curve[last] - curve[0]
        for name, moved in (
            ("gain per nat", held_out.get("kl/path", {}).get(trial, {}).get(last)),
            ("gain per drift", training.get("kl/base", {}).get(trial, {}).get(last)),
        ):
            if moved:
                put(name, trial, gain / moved)
    return values
