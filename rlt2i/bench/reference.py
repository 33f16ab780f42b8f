"""Reference bands: where the held-out score of one more run of a recipe should lie, from several seeds of it.

The band of an iteration is Student's t prediction interval of a single new run,

    mean ± t_(.975, n-1) s sqrt(1 + 1/n)

over n seeds with standard deviation s. About one evaluation in twenty of a sound run lies outside; an evaluation far
outside, or all of them on one side, says that something differs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import attrs
from scipy import stats

from rlt2i.bench.analysis import Results
from rlt2i.config import ConfigError
from rlt2i.config.references import did_you_mean
from rlt2i.recipes.recipe import Recipe, load_recipe
from rlt2i.runs.files import replace_text
from rlt2i.runs.metrics import read_metrics

FOLDER = Path(__file__).parent / "references"
FEWEST = 5
"""Seeds below which there is no band: three may agree to the last image by chance, and then nothing is inside."""


@attrs.frozen(kw_only=True)
class Band:
    """What several seeds of a recipe came to.

    Attributes:
        recipe: its name.
        set: fields that were changed, `section.field` -> value.
        hash: of the changed recipe at seed 0.
        metric: held-out component, as in eval/<metric>.
        seeds: n.
        points: iteration -> (low, mean, high).
    """

    recipe: str
    set: Mapping[str, Any]
    hash: str
    metric: str
    seeds: int
    points: Mapping[int, tuple[float, float, float]]


def prediction_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """(low, mean, high) for one more value of a normal sample.

    Raises:
        ValueError: for fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"prediction_interval of {n} values: a spread needs two or more.")
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * stdev(values) * math.sqrt(1 + 1 / n)
    return fmean(values) - reach, fmean(values), fmean(values) + reach


def write_bands(results: Results, folder: Path = FOLDER) -> list[Path]:
    """A band for every arm of a benchmark that ran at `FEWEST` seeds or more; later ones replace earlier ones."""
    plan, written = results.plan, []
    folder.mkdir(parents=True, exist_ok=True)
    for arm, spec in plan.arms.items():
        curves = [results.main[arm, seed] for seed in results.seeds(arm)]
        if len(curves) < FEWEST:
            continue
        recipe = attrs.evolve(plan.recipe(arm), train=attrs.evolve(plan.recipe(arm).train, seed=0))
        points = {step: prediction_interval([curve[step] for curve in curves]) for step in sorted(curves[0]) if step}
        band = Band(
            recipe=spec.recipe,
            set={**plan.set, **spec.set},
            hash=recipe.hash,
            metric=plan.metric,
            seeds=len(curves),
            points={step: (round(a, 4), round(b, 4), round(c, 4)) for step, (a, b, c) in points.items()},
        )
        file = folder / f"{spec.recipe}.json"
        replace_text(file, json.dumps(attrs.asdict(band), indent=1) + "\n")
        written.append(file)
    return written


def load_band(recipe: str, folder: Path = FOLDER) -> Band:
    """The band that ships for a recipe.

    Raises:
        ConfigError: when none does, naming those that do.
    """
    file = folder / f"{recipe}.json"
    if not file.is_file():
        known = sorted(path.stem for path in folder.glob("*.json"))
        raise ConfigError(
            f"--reference {recipe}: no band ships for it{did_you_mean(recipe, known)} There are: "
            f"{', '.join(known) or 'none yet'}."
        )
    value = json.loads(file.read_text(encoding="utf-8"))
    points = {int(step): tuple(point) for step, point in value.pop("points").items()}
    return Band(points=points, **value)


def compare_with_band(run: Path, band: Band) -> str:
    """Where a run lies, evaluation by evaluation, and what that comes to.

    Raises:
        ConfigError: when the folder holds no run, or the run was not evaluated where the band is.
    """
    if not (run / "recipe.yaml").is_file():
        raise ConfigError(f"{run}: no recipe.yaml, so no run to compare.")
    name = f"eval/{band.metric}"
    values = {r["step"]: float(r[name]) for r in read_metrics(run, "eval") if isinstance(r.get(name), int | float)}
    shared = [step for step in band.points if step in values]
    if not shared:
        raise ConfigError(
            f"{run}: {name} was logged at iterations {sorted(values)}, the band of {band.recipe} is at "
            f"{sorted(band.points)}. Evaluate there: "
            + " ".join(f"--set {key}={json.dumps(value)}" for key, value in band.set.items())
        )
    lines, outside = [f"{'iteration':>9} {band.metric:>9}   band of {band.recipe} ({band.seeds} seeds)"], []
    for step in shared:
        low, mean, high = band.points[step]
        where = "inside" if low <= values[step] <= high else "below" if values[step] < low else "above"
        lines.append(f"{step:>9} {values[step]:>9.3f}   [{low:.3f}, {high:.3f}], mean {mean:.3f}: {where}")
        if where != "inside":
            outside.append((step, where))
    lines += [f"note: {difference}" for difference in _differences(load_recipe(run), band)]
    if outside:
        step, where = outside[0]
        lines.append(f"Outside of the band: first at iteration {step}, {where} it ({len(outside)} of {len(shared)}).")
    else:
        lines.append(f"Inside of the band at all {len(shared)} iterations that both were evaluated at.")
    return "\n".join(lines)


def _differences(recipe: Recipe, band: Band) -> list[str]:
    """Why the band may not apply."""
    if attrs.evolve(recipe, train=attrs.evolve(recipe.train, seed=0)).hash == band.hash:
        return []
    wanted = load_recipe(band.recipe, [f"{key}={json.dumps(value)}" for key, value in band.set.items()])
    fields = list(_unlike(wanted.mapping(), recipe.mapping(), ""))
    if not fields:
        return [f"{band.recipe} itself has changed since the band was made (it was {band.hash[:12]})."]
    return [f"the run differs from the band's recipe in {', '.join(fields)}."]


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any], above: str) -> list[str]:
    differences = []
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) == b.get(key) or f"{above}{key}" in _FREE:
            continue
        below, other = a.get(key), b.get(key)
        if isinstance(below, Mapping) and isinstance(other, Mapping):
            differences += _unlike(below, other, f"{above}{key}.")
        else:
            differences.append(f"{above}{key}")
    return differences


_FREE = frozenset(
    {"name", "about", "evidence", "heldout", "train.seed", "train.trackers", "train.checkpoint_every"}
    | {"train.keep_checkpoints"}
)
"""Fields that may differ between runs that count as the same."""
