"""Rewards made of rewards: sums, changes of scale, and functions of your own."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import numpy as np
import torch
from attrs import validators
from torch import Tensor
from torch.nn.functional import interpolate

from rlt2i.config.references import load_object, reference_to
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import REASON, configuration, with_reasons
from rlt2i.rewards.validity import score_safely
from rlt2i.rewards.wrapper import Wrapper


@attrs.frozen(kw_only=True)
class WeightedSum(Reward):
    """sum_k weight_k x score_k, of raw scores: the *scale* of a reward counts as much as its weight.

    Every reward is behind `scored`, and a sample is valid only where all of them are. Components: the raw
    score of every reward under its name, and its own components under `name/component`. Maps add up with the
    weights of the rewards that have them (positive weights only); regions of a reward with a negative weight
    change sign. There is a gradient where every reward has one.

    Attributes:
        rewards: name -> (reward, weight).
    """

    rewards: Mapping[str, tuple[Reward, float]] = attrs.field()

    @rewards.validator
    def _check_rewards(self, _: Any, value: Mapping[str, tuple[Reward, float]]) -> None:
        if not value:
            raise ValueError("WeightedSum(rewards={}): a sum of nothing rewards nothing. Name at least one reward.")
        for name, (_reward, weight) in value.items():
            if not torch.isfinite(torch.tensor(float(weight))) or weight == 0:
                raise ValueError(f"WeightedSum: the weight of {name!r} is {weight}; leave the reward out instead.")

    @property
    def metadata_keys(self) -> frozenset[str]:
        return frozenset().union(*(reward.metadata_keys for reward, _ in self.rewards.values()))

    @property
    def offers(self) -> frozenset[str]:
        offers = [reward.offers for reward, _ in self.rewards.values()]
        some, all_of_them = frozenset().union(*offers), frozenset.intersection(*offers)
        return (some - {"gradient"}) | (all_of_them & {"gradient"})

    def networks(self) -> Mapping[str, int | None]:
        return {name: size for reward, _ in self.rewards.values() for name, size in reward.networks().items()}

    @property
    def concurrency(self) -> int:
        return min(reward.concurrency for reward, _ in self.rewards.values())

    @property
    def span(self) -> tuple[float, float] | None:
        ends = []
        for reward, weight in self.rewards.values():
            if reward.span is None:
                return None
            ends.append(sorted(weight * end for end in reward.span))
        return sum(low for low, _ in ends), sum(high for _, high in ends)

    @property
    def scope(self) -> Literal["sample", "group"]:
        return "group" if any(reward.scope == "group" for reward, _ in self.rewards.values()) else "sample"

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        outputs = {
            name: score_safely(reward, batch, want & reward.offers) for name, (reward, _) in self.rewards.items()
        }
        weights = {name: weight for name, (_, weight) in self.rewards.items()}
        scores = sum((weights[name] * out.scores for name, out in outputs.items()), torch.zeros(len(batch.prompts)))
        components: dict[str, Tensor] = {}
        info: list[dict[str, Any]] = [{} for _ in batch.prompts]
        reasons: list[str | None] = [None for _ in batch.prompts]
        for name, output in outputs.items():
            components[name] = output.scores
            components |= {f"{name}/{part}": values for part, values in output.components.items()}
            for row, details in enumerate(output.info or ()):
                if REASON in details:
                    reasons[row] = reasons[row] or f"{name}: {details[REASON]}"
                if details:
                    info[row][name] = dict(details)
        regions = None
        if "regions" in want and any(out.regions is not None for out in outputs.values()):
            regions = [
                [
                    attrs.evolve(region, credit=weights[name] * region.credit)
                    for name, out in outputs.items()
                    if out.regions is not None
                    for region in out.regions[row]
                ]
                for row in range(len(batch.prompts))
            ]
        reported = with_reasons(info, reasons)
        return RewardOutput(
            scores=scores,
            valid=torch.stack([out.valid for out in outputs.values()]).all(dim=0),
            components=components,
            regions=regions,
            maps=_add_maps([(weights[name], out.maps) for name, out in outputs.items() if out.maps is not None]),
            info=reported if any(reported) else None,
        )

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        parts = (weight * reward.score_tensor(images, prompts, metadata) for reward, weight in self.rewards.values())
        return sum(parts, images.new_zeros(len(images)))

    def fingerprint(self) -> dict[str, Any]:
        return configuration(self)

    def close(self) -> None:
        for reward, _ in self.rewards.values():
            reward.close()


def _add_maps(maps: list[tuple[float, Tensor]]) -> Tensor | None:
    """Weighted sum at the finest resolution; rewards with a negative weight do not say where to look."""
    kept = [(weight, values) for weight, values in maps if weight > 0]
    if not kept:
        return None
    size = max((tuple(values.shape[1:]) for _, values in kept), key=lambda shape: shape[0] * shape[1])
    resized = [weight * interpolate(values[:, None], size=size, mode="area")[:, 0] for weight, values in kept]
    return torch.stack(resized).sum(dim=0)


@attrs.frozen(kw_only=True)
class Affine(Wrapper):
    """scale x score + shift. The score of the reward inside is the component `raw`.

    Attributes:
        scale: not 0; a negative scale turns a penalty into a reward, and the regions' credits with it.
        shift: added afterwards.
    """

    scale: float = attrs.field(default=1.0)
    shift: float = attrs.field(default=0.0)

    @scale.validator
    def _check_scale(self, _: Any, value: float) -> None:
        if value == 0:
            raise ValueError("Affine(scale=0): every image would score the same, so nothing could be learned from it.")

    @property
    def span(self) -> tuple[float, float] | None:
        if self.reward.span is None:
            return None
        low, high = sorted(self.scale * end + self.shift for end in self.reward.span)
        return low, high

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = self.reward.score(batch, want)
        sign = 1.0 if self.scale > 0 else -1.0
        regions = output.regions
        if regions is not None:
            regions = [[attrs.evolve(region, credit=sign * region.credit) for region in row] for row in regions]
        return attrs.evolve(
            output,
            scores=self.scale * output.scores + self.shift,
            components={**output.components, "raw": output.scores},
            regions=regions,
        )

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.scale * self.reward.score_tensor(images, prompts, metadata) + self.shift


@attrs.frozen(kw_only=True)
class Clip(Wrapper):
    """min(max(score, low), high); nan stays nan. The score of the reward inside is the component `raw`.

    Beyond its range the gradient is 0.

    Attributes:
        low, high: the range, in the unit of the reward inside.
    """

    low: float
    high: float = attrs.field()

    @high.validator
    def _check_high(self, _: Any, value: float) -> None:
        if not self.low < value:
            raise ValueError(f"Clip(low={self.low}, high={value}): nothing lies between. Use low < high.")

    @property
    def span(self) -> tuple[float, float]:
        low, high = self.reward.span or (self.low, self.high)
        return max(self.low, min(low, self.high)), min(self.high, max(high, self.low))

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = self.reward.score(batch, want)
        scores = output.scores.clamp(self.low, self.high)
        return attrs.evolve(output, scores=scores, components={**output.components, "raw": output.scores})

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.reward.score_tensor(images, prompts, metadata).clamp(self.low, self.high)


def _named(function: str | Callable[..., Any]) -> str:
    """The name under which a recipe finds a function again.

    Raises:
        ValueError: for one that has no such name.
    """
    if isinstance(function, str):
        return function
    name = getattr(function, "__qualname__", "")
    if not name or "<" in name:
        raise ValueError(
            f"Function(function={function!r}): a recipe cannot name it, because it is defined inside another function "
            "or without a name. Define it with `def` at the top of a module or a file."
        )
    if function.__module__ == "__main__":
        return f"{Path(inspect.getsourcefile(function) or '').resolve()}:{name}"
    return reference_to(function)


def _set_of_names(value: Iterable[str]) -> frozenset[str]:
    """A single name is no set of its letters."""
    if isinstance(value, str):
        raise ValueError(f"Function(metadata_keys={value!r}): expected a list of names, such as [{value}].")
    return frozenset(value)


@attrs.frozen(kw_only=True)
class Function(Reward):
    """A plain function `(images, prompts, metadata) -> scores` as a reward.

    It is given [B, 3, H, W] uint8 RGB, B texts and B mappings, and returns B numbers (a list, an array or a
    tensor). None, nan and infinity stand for "could not judge" and make that sample invalid.

    Attributes:
        function: `module:function` or `file.py:function`; in Python also the function itself, defined at the top of
            a module, so that a recipe can name it.
        metadata_keys: metadata keys that the function reads.
        span: documented range; a score outside is invalid under `Guarded`, in a sum, and on a server.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"requires": "metadata_keys"}

    function: str = attrs.field(converter=_named, validator=validators.matches_re(r".+:\w+(\.\w+)*"))
    metadata_keys: frozenset[str] = attrs.field(default=frozenset(), converter=_set_of_names)
    span: tuple[float, float] | None = None

    def __attrs_post_init__(self) -> None:
        if not callable(self._load()):
            raise ValueError(f"Function(function={self.function!r}): that is not a function.")

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        returned = self._load()(batch.images, list(batch.prompts), list(batch.metadata))
        values = returned if isinstance(returned, Tensor | np.ndarray) else [_number(value) for value in returned]
        output = RewardOutput(scores=values, valid=torch.ones(len(values), dtype=torch.bool))
        scores = output.scores.detach().cpu()
        if scores.shape != (len(batch.prompts),):
            raise ValueError(
                f"{self.function} returned scores of shape {list(scores.shape)} for {len(batch.prompts)} images; "
                "it must return one number per image, in their order."
            )
        valid = torch.isfinite(scores)
        return RewardOutput(scores=torch.where(valid, scores, torch.nan), valid=valid) if not valid.all() else output

    def fingerprint(self) -> dict[str, Any]:
        return configuration(self, source=_source_hash(self._load()))

    def _load(self) -> Callable[..., Any]:
        return load_object(self.function)


def _number(value: Any) -> Any:
    """None says that an image cannot be judged."""
    return torch.nan if value is None else value.item() if isinstance(value, Tensor) else value


def _source_hash(function: Callable[..., Any]) -> str | None:
    """SHA-256 of the file that a function is in: what it scores may depend on all of it."""
    try:
        path = inspect.getsourcefile(function)
    except TypeError:
        return None
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
