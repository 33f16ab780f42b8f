"""Nothing that a reward does wrong may look like a bad image.

A score that is late, missing, not finite or outside its documented range is *invalid*: it leaves the
statistics of its group and the loss, and the run stops when too many are. It is never 0.0.
"""

from __future__ import annotations

import logging
import math
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from rlt2i.config.secrets import redacted_text
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import failed, merge, take_batch, with_reasons
from rlt2i.rewards.isolation import UNREADABLE, message_of, one_line, private_copy, unchanged_process
from rlt2i.rewards.wrapper import Wrapper
from rlt2i.types import Region

TOLERANCE = 1e-4
"""Relative excess over the documented range that counts as rounding."""
LARGEST = 1e36
"""Of a score: the sum over a batch must be a float32, too."""
DEBUG = "RLT2I_DEBUG"
"""Environment variable that asks for tracebacks."""
_DEEPEST_INFO = 8

_LOG = logging.getLogger(__name__)


def score_safely(reward: Reward, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
    """`reward.score(batch, want)`, whatever the reward does.

    Samples without the metadata that the reward requires are invalid, and so are those whose score is not
    finite or outside `reward.span`. An exception (`sys.exit` among them), or an output of the wrong length or type,
    makes the whole batch invalid. The reason is in `info[i]["error"]` and in the log; the score is nan. The reward is
    handed a copy of the batch, and settings of the process that it changes are put back.

    Raises:
        KeyboardInterrupt: when the user asks for it.
        ImportError: when the reward does: a package that is not installed is no fault of the images.
    """
    count = len(batch.prompts)
    missing = [sorted(reward.metadata_keys - metadata.keys()) for metadata in batch.metadata]
    if not any(missing):
        return _scored(reward, batch, want)
    why = f"missing metadata key(s) {sorted(set().union(*missing))}"
    complete = [row for row in range(count) if not missing[row]]
    if reward.scope == "group" or not complete:
        return _all_failed(reward, count, why)
    _LOG.error("%s: %d of %d samples are invalid: %s", _name(reward), count - len(complete), count, why)
    lacking = [row for row in range(count) if missing[row]]
    parts = [
        (complete, _scored(reward, take_batch(batch, complete), want)),
        (lacking, failed(len(lacking), why)),
    ]
    return merge(parts, count)


def _scored(reward: Reward, batch: RewardBatch, want: frozenset[str]) -> RewardOutput:
    count = len(batch.prompts)
    try:
        with unchanged_process(_name(reward)):
            output: Any = reward.score(private_copy(batch), want)
        output = checked(output, reward, count)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        why = message_of(error)
        if isinstance(error, ImportError) and UNREADABLE not in why:
            raise
        return _all_failed(reward, count, redacted_text(why) + _place(error), trace=bool(os.environ.get(DEBUG)))
    for name in sorted(want & {"maps", "regions"}):
        if getattr(output, name) is None and output.valid.any():
            return _all_failed(reward, count, f"returned no {name}, which it says that it offers")
    return output


def _place(error: BaseException) -> str:
    """Where an exception was raised: what a user who sees only the reason needs to find it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def checked(output: RewardOutput, reward: Reward, count: int) -> RewardOutput:
    """An output whose valid samples can be trusted, in memory that the reward does not share.

    Args:
        output: what the reward returned.
        reward: for its name and span.
        count: of images that it was given.

    Returns:
        On the CPU; the scores of invalid samples are nan, and `info` says why they are invalid.
    """
    wrong = _misshapen(output, count)
    if wrong:
        return _all_failed(reward, count, wrong)
    scores, valid = _own(output.scores), output.valid.detach().cpu().clone()
    maps = None if output.maps is None else _own(output.maps)
    info = None if output.info is None else [_details(row) for row in output.info]
    reasons: list[str | None] = [None if ok else "the reward could not judge this image" for ok in valid.tolist()]
    low, high = reward.span or (-torch.inf, torch.inf)
    slack = TOLERANCE * max(1.0, high - low if reward.span else 1.0)
    for row in valid.nonzero().flatten().tolist():
        score = float(scores[row])
        if not torch.isfinite(scores[row]):
            reasons[row] = f"the score is {score}"
        elif abs(score) > LARGEST:
            reasons[row] = f"the score {score:g} is too large to compare with others"
        elif not low - slack <= score <= high + slack:
            reasons[row] = f"the score {score:g} is outside the documented range [{low:g}, {high:g}]"
        elif maps is not None and not (torch.isfinite(maps[row].sum()) and (maps[row] >= 0).all()):
            reasons[row] = "the map is negative or not finite"
    bad = torch.tensor([why is not None for why in reasons], dtype=torch.bool)
    fresh = bad & valid
    if fresh.any():
        first = int(fresh.nonzero()[0])
        _LOG.error("%s: %d of %d scores are invalid; %s.", _name(reward), int(fresh.sum()), count, reasons[first])
    return attrs.evolve(
        output,
        scores=torch.where(bad, torch.nan, scores),
        valid=valid & ~bad,
        components={name: _finite_or_nan(values) for name, values in output.components.items()},
        regions=None if output.regions is None else [tuple(row) for row in output.regions],
        maps=None if maps is None else torch.where(bad[:, None, None], 0.0, maps),
        info=with_reasons(info, reasons) if bad.any() else info,
    )


def _misshapen(output: Any, count: int) -> str | None:
    """What makes an output unusable as a whole, if anything."""
    if not isinstance(output, RewardOutput):
        return f"returned {type(output).__name__}, expected RewardOutput"
    if not isinstance(output.components, Mapping):
        return f"returned components as {type(output.components).__name__}, expected a mapping of names to tensors"
    numbers: dict[str, Any] = {"scores": output.scores, **output.components}
    numbers |= {} if output.maps is None else {"maps": output.maps}
    for name, values in {**numbers, "valid": output.valid}.items():
        if not isinstance(name, str):
            return f"returned a component called {name!r}; names are texts"
        if not isinstance(values, Tensor) or values.layout is not torch.strided or values.is_complex():
            kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
            return f"returned {name} as {kind}, expected a dense tensor of real numbers"
    if output.scores.dtype is torch.bool:
        return "returned scores as torch.bool, expected numbers: where True means 1.0, write scores.float()"
    if output.valid.dtype is not torch.bool:
        return f"returned valid as {output.valid.dtype}, expected torch.bool"
    for name, values in {**numbers, "valid": output.valid, "regions": output.regions, "info": output.info}.items():
        if values is None:
            continue
        if isinstance(values, str | Mapping) or not hasattr(values, "__len__"):
            return f"returned {name} as {type(values).__name__}, expected one entry for every image"
        if isinstance(values, Tensor) and values.ndim != (3 if name == "maps" else 1):
            return f"returned {name} of shape {list(values.shape)} for {count} images"
        if len(values) != count:
            return f"returned {len(values)} {name} for {count} images"
    if output.maps is not None and 0 in output.maps.shape:
        return f"returned maps of shape {list(output.maps.shape)}"
    if output.regions is not None and not all(isinstance(r, Region) for row in output.regions for r in row):
        return "returned regions that are no Region"
    return None


def _own(values: Tensor) -> Tensor:
    """float32 on the CPU, in memory that nobody else writes to."""
    return values.detach().to("cpu", torch.float32, copy=True)


def _details(row: Any) -> Mapping[str, Any]:
    """What a reward has to say about one image, as plain data: it goes into files."""
    if row is None:
        return {}
    return _plain(row) if isinstance(row, Mapping) else {"note": _plain(row)}


def _plain(value: Any, depth: int = 0) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if depth > _DEEPEST_INFO:
        return "..."
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, Tensor | np.ndarray):
        return _plain(value.tolist(), depth + 1)
    return one_line(repr(value))


def _all_failed(reward: Reward, count: int, why: str, *, trace: bool = False) -> RewardOutput:
    _LOG.error("%s: a batch of %d is invalid: %s", _name(reward), count, why, exc_info=trace)
    return failed(count, why)


def _name(reward: Reward) -> str:
    return type(reward).__name__


def _finite_or_nan(values: Tensor) -> Tensor:
    values = values.detach().float().cpu()
    return torch.where(torch.isfinite(values), values, torch.nan)


@attrs.frozen(kw_only=True)
class Guarded(Wrapper):
    """Another reward behind `scored`: it never raises, and what it calls valid is finite and in range."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        return score_safely(self.reward, batch, want)
