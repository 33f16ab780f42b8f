"""Does the image say what the prompt asked it to say?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import attrs
import numpy as np
import torch
from attrs import validators
from PIL import Image, ImageDraw
from torch import Tensor

from rlt2i.inputs.typography import is_blank
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import REASON, configuration
from rlt2i.rewards.ocr_engine import Engines, Line, engine_fingerprint
from rlt2i.rewards.pooled import usable_cores
from rlt2i.rewards.text import (
    Rule,
    comparable,
    edit_distance,
    quoted_text,
    substring_distance,
    verdict_of_each,
    verdicts,
)
from rlt2i.types import Region

CELL = 8
"""Pixels a side of a cell of the maps: the resolution of the latents."""
_CREDIT = {"right": 1.0, "wrong": -1.0, "free": 0.0}


@attrs.frozen(kw_only=True)
class OCRReward(Reward):
    """1 - min(d, n) / n in [0, 1]: d is the edit distance between what was read and the target of n
    characters.

    The target is `metadata["text"]` where that shows something, else the first text in double quotes; a sample
    without either is invalid. Case and white space do not count. With `rule="published"`, `match="full"` is the
    reward of Flow-GRPO (arXiv 2505.05470).

    Components: `exact`, 1 where the image says the target and nothing else; `edit`, the edit distance between
    the whole reading and the target, in characters; `extra`, the share of the reading that is more than the
    target is long: where it rises, the policy has learned to write the target twice; `lines`; `confidence` of
    the recogniser, nan without text. Regions are characters: credit 1 where right, -1 where it costs, 0 where
    the score ignores it. Maps mark the characters that count, at 1/8 of the image's resolution, in [0, 1].

    Attributes:
        match: "full" compares with everything that was read, except that text around the complete target is
            free; so a near miss next to other writing can score 0. "partial" compares with the best
            substring.
        rule: "normalised" takes characters for the same that look the same, on both sides, so that a perfect picture
            of any target scores 1: quotes, dashes, ellipses, spaces of every kind, invisible characters, accents
            composed or not, full and half width. "published" asks for equal characters in lower case, spaces aside.
        workers: threads, with an engine each (about 100 MB); 0 means one per usable core.
    """

    offers = frozenset({"maps", "regions"})
    span = (0.0, 1.0)

    match: Literal["full", "partial"] = attrs.field(default="full", validator=validators.in_(("full", "partial")))
    rule: Rule = attrs.field(default="normalised", validator=validators.in_(("normalised", "published")))
    workers: int = attrs.field(default=0, validator=validators.ge(0))
    _engines: Engines = attrs.field(init=False, factory=Engines, eq=False, repr=False)

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        import rapidocr  # noqa: F401 - a package that is missing is an error, not an image that cannot be judged

        localise = bool(want & {"maps", "regions"})
        images = batch.images.permute(0, 2, 3, 1).cpu().numpy()
        targets = [_target(p, m, self.rule) for p, m in zip(batch.prompts, batch.metadata, strict=True)]
        with ThreadPoolExecutor(min(self.workers or usable_cores(), len(targets)), thread_name_prefix="ocr") as threads:
            judged = list(threads.map(lambda image, target: self._judge(image, target, localise), images, targets))
        size = images.shape[1:3]
        return RewardOutput(
            scores=torch.tensor([one.score for one in judged]),
            valid=torch.tensor([one.error is None for one in judged]),
            components={
                name: torch.tensor([one.components.get(name, math.nan) for one in judged]) for name in COMPONENTS
            },
            regions=[_regions(one.characters, size) for one in judged] if "regions" in want else None,
            maps=torch.stack([_map(one.characters, size) for one in judged]) if "maps" in want else None,
            info=[
                {"read": one.read, "target": target} if one.error is None else {REASON: one.error}
                for one, target in zip(judged, targets, strict=True)
            ],
        )

    def fingerprint(self) -> dict[str, Any]:
        return configuration(self, without=("workers",), **engine_fingerprint())

    def close(self) -> None:
        self._engines.clear()

    def _judge(self, image: np.ndarray, target: str | None, localise: bool) -> _Judgement:
        if target is None:
            return _Judgement(error='no text to look for: neither metadata["text"] nor a text in double quotes')
        try:
            lines = self._engines.read(image, characters=localise)
        except ImportError:
            raise
        except Exception as error:
            return _Judgement(error=f"OCR failed: {type(error).__name__}: {error}"[:1000])
        read, wanted = (comparable(text, self.rule).text for text in ("".join(line.text for line in lines), target))
        score = match_score(read, wanted, match=self.match)
        anywhere = self.match == "partial" or wanted in read
        return _Judgement(
            score=score,
            read=" | ".join(line.text for line in lines),
            components=_components(read, wanted, lines),
            characters=_verdicts(lines, wanted, anywhere=anywhere, rule=self.rule) if localise else (),
        )


COMPONENTS = ("exact", "edit", "extra", "lines", "confidence")


@attrs.frozen(kw_only=True)
class _Judgement:
    """Of one image; `characters` are (character, corners in pixels, credit)."""

    error: str | None = None
    score: float = math.nan
    read: str = ""
    components: dict[str, float] = attrs.field(factory=dict)
    characters: tuple[tuple[str, tuple[tuple[float, float], ...], float], ...] = ()


def match_score(read: str, target: str, *, match: Literal["full", "partial"]) -> float:
    """The reward of a squashed reading; see `OCRReward`. `target` is not empty."""
    if match == "partial":
        distance = substring_distance(target, read)
    else:
        distance = 0 if target in read else edit_distance(read, target)
    return 1 - min(distance, len(target)) / len(target)


def _target(prompt: str, metadata: Any, rule: Rule) -> str | None:
    text = metadata.get("text")
    target = text if isinstance(text, str) and not is_blank(text) else quoted_text(prompt)
    return target if target is not None and comparable(target, rule).text else None


def _components(read: str, wanted: str, lines: Sequence[Line]) -> dict[str, float]:
    length = sum(len(line.text) for line in lines)
    components = {
        "exact": float(read == wanted),
        "edit": float(edit_distance(read, wanted)),
        "extra": max(0, len(read) - len(wanted)) / len(read) if read else 0.0,
        "lines": float(len(lines)),
    }
    if length:
        components["confidence"] = sum(line.confidence * len(line.text) for line in lines) / length
    return components


def _verdicts(lines: Sequence[Line], wanted: str, *, anywhere: bool, rule: Rule) -> tuple[Any, ...]:
    """(character, corners, credit) of everything that was read."""
    characters = [(letter, quad) for line in lines for letter, quad in line.characters]
    form = comparable("".join(letter for letter, _ in characters), rule)
    verdict_of_character = verdict_of_each(len(characters), form, verdicts(form.text, wanted, anywhere=anywhere))
    return tuple(
        (letter, quad, _CREDIT[verdict])
        for (letter, quad), verdict in zip(characters, verdict_of_character, strict=True)
    )


def _regions(characters: Sequence[Any], size: tuple[int, ...]) -> list[Region]:
    height, width = size
    regions = []
    for letter, quad, credit in characters:
        xs = [min(max(x / width, 0.0), 1.0) for x, _ in quad]
        ys = [min(max(y / height, 0.0), 1.0) for _, y in quad]
        regions.append(Region(box=(min(xs), min(ys), max(xs), max(ys)), credit=credit, label=letter))
    return regions


def _map(characters: Sequence[Any], size: tuple[int, ...]) -> Tensor:
    """[ceil(H/8), ceil(W/8)], the share of each cell under characters that count."""
    height, width = size
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    for _, quad, credit in characters:
        if credit:
            draw.polygon(quad, fill=1)
    covered = torch.from_numpy(np.array(canvas, dtype=np.float32))
    cells = (math.ceil(height / CELL), math.ceil(width / CELL))
    return torch.nn.functional.adaptive_avg_pool2d(covered[None, None], cells)[0, 0]
