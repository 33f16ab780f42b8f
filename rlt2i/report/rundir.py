"""A run directory, read with patience: runs get killed and disks fill up, and the report still says what is there.

Layout: recipe.yaml, versions.json, metrics.jsonl, images/eval-<step>.safetensors,
maps/step-<step>.safetensors, checkpoints/.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import yaml

from rlt2i.runs.artifacts import EvalImages as EvalImages
from rlt2i.runs.artifacts import MapSample as MapSample
from rlt2i.runs.artifacts import UnreadableFileError as UnreadableFileError
from rlt2i.runs.artifacts import open_images as open_images
from rlt2i.runs.artifacts import open_maps as open_maps
from rlt2i.runs.metrics import parse_metrics

Row = Mapping[str, float]
PASS = 0.999
"""A score from here on counts as passed, where scores lie in [0, 1]."""


@attrs.frozen(kw_only=True, eq=False)
class Run:
    """What a run left behind.

    Attributes:
        path: the directory.
        recipe_text, recipe: the resolved recipe as written and as parsed; empty when missing.
        versions: parsed versions.json; empty when missing.
        train, evals: metrics by update, one row an update, ascending; every row has "step".
        images, maps: update -> file.
        checkpoints: names of checkpoint folders.
        problems: what could not be read, in words for the reader of the report.
    """

    path: Path
    recipe_text: str
    recipe: Mapping[str, Any]
    versions: Mapping[str, Any]
    train: Sequence[Row]
    evals: Sequence[Row]
    images: Mapping[int, Path]
    maps: Mapping[int, Path]
    checkpoints: Sequence[str]
    problems: Sequence[str]

    @property
    def title(self) -> str:
        """The recipe's name, or the directory's."""
        name = self.recipe.get("name") or self.recipe.get("recipe")
        return name if isinstance(name, str) else self.path.resolve().name


def read_run(path: Path) -> Run:
    """Read everything but the images.

    Raises:
        ValueError: `path` is not a directory.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"read_run({str(path)!r}): not a directory. Give the run directory that `rlt2i train` printed."
        )
    problems: list[str] = []
    recipe_text = _text(path / "recipe.yaml", problems)
    recipe = _parsed(path / "recipe.yaml", recipe_text, yaml.safe_load, problems)
    versions = _parsed(path / "versions.json", _text(path / "versions.json", problems), json.loads, problems)
    train, evals = _metrics(path / "metrics.jsonl", problems)
    folder = path / "checkpoints"
    folders = [p.name for p in (folder if folder.is_dir() else path).iterdir() if p.is_dir()]
    return Run(
        path=path,
        recipe_text=recipe_text,
        recipe=recipe,
        versions=versions,
        train=train,
        evals=evals,
        images=_numbered(path / "images", r"eval-(\d+)\.safetensors"),
        maps=_numbered(path / "maps", r"step-(\d+)\.safetensors"),
        checkpoints=sorted(n for n in folders if folder.is_dir() or n.startswith("checkpoint")),
        problems=problems,
    )


def _text(path: Path, problems: list[str]) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}.")
        return ""


def _parsed(path: Path, text: str, parse: Any, problems: list[str]) -> Mapping[str, Any]:
    if not text.strip():
        return {}
    try:
        value = parse(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        problems.append(f"{path.name} cannot be parsed: {str(error).splitlines()[0]}.")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds a {type(value).__name__}, expected a mapping.")
        return {}
    return value


def _metrics(path: Path, problems: list[str]) -> tuple[list[Row], list[Row]]:
    """Rows by phase. A resumed run writes some updates twice: the later row counts."""
    rows: dict[str, dict[int, dict[str, float]]] = {"train": {}, "eval": {}}
    broken = 0
    for _, record in parse_metrics(_text(path, problems)):
        if record is None or record["phase"] not in rows:
            broken += 1
            continue
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        rows[record["phase"]][record["step"]] = {"step": record["step"], **numbers}
    if broken:
        problems.append(
            f"metrics.jsonl: {broken} {'line' if broken == 1 else 'lines'} could not be read and were left "
            "out (a run that was killed while writing leaves one)."
        )
    return [rows["train"][k] for k in sorted(rows["train"])], [rows["eval"][k] for k in sorted(rows["eval"])]


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = ((re.fullmatch(pattern, p.name), p) for p in folder.iterdir())
    return dict(sorted((int(m.group(1)), p) for m, p in matches if m))


def column(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """The iterations at which a metric was logged, and its values."""
    kept = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in kept], [value for _, value in kept]


def has_pass_mark(scores: Sequence[float]) -> bool:
    """Whether scores lie in [0, 1] and reach an end of it, so that "passed" means something.

    A strict or partial verifier does; a preference score of .22 or 23 does not.
    """
    finite = [score for score in scores if math.isfinite(score)]
    if not finite or min(finite) < 0 or max(finite) > 1.0001:
        return False
    return max(finite) >= PASS or all(score == 0 for score in finite)
