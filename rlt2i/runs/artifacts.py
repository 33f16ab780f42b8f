"""The files of images, maps and evaluations that a run leaves: their one writer and their one reader.

images/eval-<iteration>.safetensors    images [N, 3, H, W] uint8, scores, valid, component/<name>, and the same of every
                                       held-out reward below heldout/<reward>/; prompts and categories in the header
maps/step-<iteration>.safetensors      weights [M, T, h, w], clean [M, T, 3, H, W] uint8, final [M, 3, H, W] uint8,
                                       sigmas [T+1]; prompts, core phrases and scores in the header
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlt2i.runs.files import replace_tensors


class UnreadableFileError(ValueError):
    """A file of a run directory that does not hold what its name promises."""


def evaluation_file(run_dir: Path, iteration: int) -> Path:
    """Where the evaluation after `iteration` is kept."""
    return run_dir / "images" / f"eval-{iteration:06d}.safetensors"


def maps_file(run_dir: Path, iteration: int) -> Path:
    """Where the maps of `iteration` are kept."""
    return run_dir / "maps" / f"step-{iteration:06d}.safetensors"


# ----------------------------------------------------------------------------------------------------- evaluations


@attrs.frozen(kw_only=True, eq=False)
class SavedEvaluation:
    """An evaluation as it was written.

    Attributes:
        prompts: N texts.
        tensors: "images" [N, 3, H, W] uint8, "scores" and "valid" [N], and whatever else was kept, [N] each.
    """

    prompts: Sequence[str]
    tensors: Mapping[str, Tensor]


def write_evaluation(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    prompts: Sequence[str],
    categories: Sequence[str],
    headline: Sequence[float],
    notes: Sequence[str] = (),
) -> None:
    """Write an evaluation in one step.

    Args:
        tensors: see `SavedEvaluation`.
        headline: the scores that a report shows below the images.
        notes: what the reward told of each image.
    """
    info = {"prompts": list(prompts), "categories": list(categories), "scores": list(headline)}
    info["notes"] = list(notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_tensors(path, tensors, metadata={"info": json.dumps(info)})


def read_evaluation(path: Path) -> SavedEvaluation:
    """The evaluation written at `path`.

    Raises:
        UnreadableFileError: when the file is missing or damaged.
    """
    tensors, info = _read(path)
    prompts, images, scores, valid = info.get("prompts"), *(tensors.get(k) for k in ("images", "scores", "valid"))
    if images is None or scores is None or valid is None or not isinstance(prompts, list):
        raise UnreadableFileError(f"{path}: holds no images, scores, validity and prompts, so it is no evaluation.")
    if wrong := [name for name, value in tensors.items() if value.shape[:1] != (len(prompts),)]:
        raise UnreadableFileError(f"{path}: {wrong[0]} is {list(tensors[wrong[0]].shape)} for {len(prompts)} prompts.")
    if images.dtype is not torch.uint8 or valid.dtype is not torch.bool:
        raise UnreadableFileError(f"{path}: images are {images.dtype} and valid is {valid.dtype}; another format.")
    return SavedEvaluation(prompts=[str(text) for text in prompts], tensors=tensors)


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


def open_images(path: Path, step: int) -> EvalImages:
    """Open images/eval-<step>.safetensors.

    Raises:
        UnreadableFileError: for a file that holds something else, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            shape = file.get_slice("images").get_shape()
            dtype = file.get_slice("images").get_dtype()
            info = _info(file.metadata())
    except (SafetensorError, OSError, ValueError) as error:
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


# ------------------------------------------------------------------------------------------------------------ maps


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


def write_maps(
    path: Path,
    *,
    weights: Tensor,
    clean: Tensor,
    final: Tensor,
    sigmas: Tensor,
    prompts: Sequence[str],
    core: Sequence[Sequence[str]],
    scores: Sequence[float],
) -> None:
    """Write the allocation maps of M rollouts in one step.

    Args:
        weights: [M, T, h, w].
        clean: [M, T, 3, H, W] uint8, what the policy foresaw at each step.
        final: [M, 3, H, W] uint8.
        sigmas: [T+1].
    """
    info = {"prompts": list(prompts), "core": [list(phrases) for phrases in core], "scores": list(scores)}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"weights": weights, "clean": clean, "final": final, "sigmas": sigmas}
    replace_tensors(path, tensors, metadata={"info": json.dumps(info)})


def open_maps(path: Path) -> list[MapSample]:
    """Load maps/step-<step>.safetensors.

    Raises:
        UnreadableFileError: for a file that holds something else, or is damaged.
    """
    tensors, info = _read(path)
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


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, _info(file.metadata())
    except (SafetensorError, OSError, ValueError) as error:
        raise UnreadableFileError(f"{path.name} cannot be read: {error}") from error


def _info(metadata: Mapping[str, str] | None) -> Mapping[str, Any]:
    info = json.loads((metadata or {}).get("info", "{}"))
    return info if isinstance(info, dict) else {}


def _fill(values: Any, count: int, default: Any, convert: Any) -> list[Any]:
    """`count` converted values; a list that is missing or of another length is filled up."""
    values = values if isinstance(values, list) else []
    return [default if i >= len(values) or values[i] is None else convert(values[i]) for i in range(count)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
