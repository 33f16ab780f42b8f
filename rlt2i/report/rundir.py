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
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

Row = Mapping[str, float]
PASS = 0.999
"""A score from here on counts as passed, where scores lie in [0, 1]."""


class UnreadableFileError(ValueError):
    """A file of a run directory that does not hold what its name promises."""


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
    found = [p.name for p in (folder if folder.is_dir() else path).iterdir() if p.is_dir()]
    return Run(
        path=path,
        recipe_text=recipe_text,
        recipe=recipe,
        versions=versions,
        train=train,
        evals=evals,
        images=_numbered(path / "images", r"eval-(\d+)\.safetensors"),
        maps=_numbered(path / "maps", r"step-(\d+)\.safetensors"),
        checkpoints=sorted(n for n in found if folder.is_dir() or n.startswith("checkpoint")),
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
    """Rows by phase. A resumed run writes some iterations twice: the later row counts."""
    rows: dict[str, dict[int, dict[str, float]]] = {"train": {}, "eval": {}}
    broken = 0
    for line in _text(path, problems).splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            phase, step = record["phase"], int(record["step"])
            target = rows[phase]
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            broken += 1
            continue
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        target[step] = {"step": step, **numbers}
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


@attrs.frozen(kw_only=True, eq=False)
class EvalImages:
    """The images of one evaluation, opened but not loaded; `notes`: what the reward told of each, "" where unknown."""

    path: Path
    step: int
    prompts: Sequence[str]
    scores: Sequence[float]
    categories: Sequence[str]
    notes: Sequence[str] = attrs.field(default=attrs.Factory(lambda self: [""] * len(self.prompts), takes_self=True))

    def __len__(self) -> int:
        return len(self.prompts)

    def image(self, index: int) -> Tensor:
        """[3, H, W] uint8."""
        with safe_open(self.path, "pt") as file:
            return file.get_slice("images")[index]


@attrs.frozen(kw_only=True, eq=False)
class MapSample:
    """The maps of one sample.

    Attributes:
        prompt, score, core: what was asked, its reward, the core phrases.
        weights: [T, h, w].
        final: [3, H, W] uint8.
        clean: [T, 3, H, W] uint8, or None where it was not recorded.
        sigmas: T+1 levels.
    """

    prompt: str
    score: float
    core: Sequence[str]
    weights: Tensor
    final: Tensor
    clean: Tensor | None
    sigmas: Sequence[float]


def open_images(path: Path, step: int) -> EvalImages:
    """Open images/eval-<step>.safetensors."""
    try:
        with safe_open(path, "pt") as file:
            shape = file.get_slice("images").get_shape()
            dtype = file.get_slice("images").get_dtype()
            info = _info(file.metadata())
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UnreadableFileError(f"{path.name} cannot be read: {error}") from error
    if len(shape) != 4 or shape[1] != 3 or dtype != "U8":
        raise UnreadableFileError(f"{path.name}: images are {dtype} {shape}, expected U8 [N, 3, H, W].")
    count = shape[0]
    return EvalImages(
        path=path,
        step=step,
        prompts=_fill(info.get("prompts"), count, "(prompt not recorded)", str),
        scores=_fill(info.get("scores"), count, math.nan, _number),
        categories=_fill(info.get("categories"), count, "all", str),
        notes=_fill(info.get("notes"), count, "", str),
    )


def open_maps(path: Path) -> list[MapSample]:
    """Load maps/step-<step>.safetensors."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            info = _info(file.metadata())
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UnreadableFileError(f"{path.name} cannot be read: {error}") from error
    missing = [name for name in ("weights", "final", "sigmas") if name not in tensors]
    if missing:
        raise UnreadableFileError(f"{path.name}: no tensor {' and no '.join(missing)}.")
    weights, final, sigmas = tensors["weights"].float(), tensors["final"], tensors["sigmas"].float()
    clean = tensors.get("clean")
    count = len(final)
    if weights.ndim != 4 or final.ndim != 4 or len(weights) != count or final.dtype is not torch.uint8:
        raise UnreadableFileError(
            f"{path.name}: weights {list(weights.shape)}, final {final.dtype} {list(final.shape)}; expected "
            "[M, T, h, w] and uint8 [M, 3, H, W]."
        )
    if clean is not None and (clean.ndim != 5 or len(clean) != count or clean.dtype is not torch.uint8):
        raise UnreadableFileError(
            f"{path.name}: clean is {clean.dtype} {list(clean.shape)}, expected uint8 [M, T, 3, H, W]."
        )
    prompts = _fill(info.get("prompts"), count, "(prompt not recorded)", str)
    scores = _fill(info.get("scores"), count, math.nan, _number)
    core = _fill(info.get("core"), count, (), lambda spans: tuple(str(span) for span in spans))
    return [
        MapSample(
            prompt=prompts[i],
            score=scores[i],
            core=core[i],
            weights=weights[i],
            final=final[i],
            clean=None if clean is None else clean[i],
            sigmas=sigmas.tolist(),
        )
        for i in range(count)
    ]


def _info(metadata: Mapping[str, str] | None) -> Mapping[str, Any]:
    info = json.loads((metadata or {}).get("info", "{}"))
    return info if isinstance(info, dict) else {}


def _fill(values: Any, count: int, default: Any, convert: Any) -> list[Any]:
    """`count` converted values; a list that is missing or of another length is filled up."""
    values = values if isinstance(values, list) else []
    return [default if i >= len(values) or values[i] is None else convert(values[i]) for i in range(count)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
