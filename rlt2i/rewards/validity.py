"""Nothing that a reward does wrong may look like a bad image.

A score that is late, missing, not finite or outside its documented range is *invalid*: it leaves the
statistics of its group and the loss, and the run stops when too many are. It is never 0.0.
"""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.config.secrets import redacted_text
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import failed, merge, take_batch, with_reasons
from rlt2i.rewards.wrapper import Wrapper

TOLERANCE = 1e-4
"""Relative excess over the documented range that counts as rounding."""

_LOG = logging.getLogger(__name__)


def score_safely(reward: Reward, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
    """`reward.score(batch, want)`, whatever the reward does.

    Samples without the metadata that the reward requires are invalid, and so are those whose score is not
    finite or outside `reward.span`. An exception, or an output of the wrong length, makes the whole batch
    invalid. The reason is in `info[i]["error"]` and in the log; the score is nan. Exceptions that end the
    process pass through, and so does ImportError: a package that is not installed is no fault of the images.
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
    try:
        output: Any = reward.score(batch, want)
    except ImportError:
        raise
    except Exception as error:
        _LOG.error("%s raised on a batch of %d.", _name(reward), len(batch.prompts), exc_info=True)
        return failed(len(batch.prompts), redacted_text(f"{type(error).__name__}: {error}"[:1000]) + _place(error))
    output = checked(output, reward, len(batch.prompts))
    for name in sorted(want & {"maps", "regions"}):
        if getattr(output, name) is None and output.valid.any():
            return _all_failed(reward, len(batch.prompts), f"returned no {name}, which it says that it offers")
    return output


def _place(error: Exception) -> str:
    """Where an exception was raised: what a user who sees only the reason needs to find it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def checked(output: RewardOutput, reward: Reward, count: int) -> RewardOutput:
    """An output whose valid samples can be trusted.

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
    scores, valid = output.scores.detach().float().cpu(), output.valid.detach().cpu()
    maps = None if output.maps is None else output.maps.detach().float().cpu()
    reasons: list[str | None] = [None if ok else "the reward could not judge this image" for ok in valid.tolist()]
    low, high = reward.span or (-torch.inf, torch.inf)
    slack = TOLERANCE * max(1.0, high - low if reward.span else 1.0)
    for row in valid.nonzero().flatten().tolist():
        score = float(scores[row])
        if not torch.isfinite(scores[row]):
            reasons[row] = f"the score is {score}"
        elif not low - slack <= score <= high + slack:
            reasons[row] = f"the score {score:g} is outside the documented range [{low:g}, {high:g}]"
        elif maps is not None and not (torch.isfinite(maps[row]).all() and (maps[row] >= 0).all()):
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
        maps=None if maps is None else torch.where(bad[:, None, None], 0.0, maps),
        info=with_reasons(output.info, reasons) if bad.any() else output.info,
    )


def _misshapen(output: Any, count: int) -> str | None:
    """What makes an output unusable as a whole, if anything."""
    if not isinstance(output, RewardOutput):
        return f"returned {type(output).__name__}, expected RewardOutput"
    fields: dict[str, Any] = {"scores": output.scores, "valid": output.valid, **output.components}
    fields |= {"maps": output.maps, "regions": output.regions, "info": output.info}
    for name, values in fields.items():
        if values is not None and len(values) != count:
            return f"returned {len(values)} {name} for {count} images"
    if output.valid.dtype is not torch.bool:
        return f"returned valid as {output.valid.dtype}, expected torch.bool"
    return None


def _finite_or_nan(values: Tensor) -> Tensor:
    values = values.detach().float().cpu()
    return torch.where(torch.isfinite(values), values, torch.nan)


def _all_failed(reward: Reward, count: int, reason: str) -> RewardOutput:
    _LOG.error("%s: all %d samples are invalid: %s.", _name(reward), count, reason)
    return failed(count, reason)


def _name(reward: Reward) -> str:
    return type(reward).__name__


@attrs.frozen(kw_only=True)
class Guarded(Wrapper):
    """Another reward behind `scored`: it never raises, and what it calls valid is finite and in range."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        return score_safely(self.reward, batch, want)
