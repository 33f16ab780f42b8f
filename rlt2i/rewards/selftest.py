"""`rlt2i reward test NAME`: does the reward prefer a good picture to bad ones, and how long does it take?

It catches the all-zeros trap: a reward that fails quietly and calls everything equally bad.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.config import Parts
from rlt2i.inputs.imagefiles import ImageFileError, read_picture
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import REASON
from rlt2i.rewards.combinators import Affine
from rlt2i.rewards.naming import named_reward
from rlt2i.rewards.released import check
from rlt2i.rewards.selftest_cases import CASES, Case, drawing_case
from rlt2i.rewards.validity import score_safely
from rlt2i.rewards.wrapper import Wrapper

GOOD = "good"


@attrs.frozen(kw_only=True)
class Verdict:
    """What a reward made of a case.

    Attributes:
        names: of the pictures, the good one first.
        scores: of the pictures, in the reward's unit; nan where invalid.
        problems: what is wrong; empty when all is well.
        seconds: per image, of a second run; the first one loads.
        first_seconds: of the whole first run.
        details: per picture.
    """

    names: tuple[str, ...]
    scores: tuple[float, ...]
    problems: tuple[str, ...]
    seconds: float
    first_seconds: float
    details: tuple[Mapping[str, Any], ...]


def case_for(reward: Reward) -> Case:
    """The bundled pictures for a reward.

    Raises:
        ValueError: when there are none, saying what to give instead.
    """
    if isinstance(reward, Wrapper):
        case = case_for(reward.reward)
        return case.reversed() if isinstance(reward, Affine) and reward.scale < 0 else case
    name = type(reward).__name__
    if name == "RemoteReward":
        name = str(reward.fingerprint()["of"]["reward"])
    if name in CASES:
        return CASES[name]()
    if reward.metadata_keys:
        raise ValueError(
            f"reward test: no pictures are bundled for {name}, which needs the metadata "
            f"{sorted(reward.metadata_keys)}. Bring your own: --good FILE --bad FILE --prompt TEXT --metadata JSON."
        )
    foreign = name != type(reward).__name__ or not type(reward).__module__.startswith("rlt2i.")
    return attrs.evolve(drawing_case(), general=foreign)


def judge_case(reward: Reward, case: Case) -> Verdict:
    """Score the pictures of a case twice and say what is wrong."""
    pictures = {GOOD: case.good, **case.bad}
    batch = RewardBatch(
        images=torch.stack(list(pictures.values())),
        prompts=[case.prompt] * len(pictures),
        metadata=[case.metadata] * len(pictures),
    )
    start = time.perf_counter()
    score_safely(reward, batch)
    middle = time.perf_counter()
    output = score_safely(reward, batch)
    end = time.perf_counter()
    return Verdict(
        names=tuple(pictures),
        scores=tuple(output.scores.tolist()),
        problems=_problems(list(pictures), output),
        seconds=(end - middle) / len(pictures),
        first_seconds=middle - start,
        details=tuple(output.info or [{} for _ in pictures]),
    )


def _problems(names: list[str], output: RewardOutput) -> tuple[str, ...]:
    problems = []
    for name, score, details in zip(names, output.scores.tolist(), output.info or [{}] * len(names), strict=True):
        if math.isnan(score):
            problems.append(f"{name!r} was not scored: {details.get(REASON, 'no reason given')}")
        elif name != GOOD and not math.isnan(float(output.scores[0])) and not float(output.scores[0]) > score:
            problems.append(
                f"{name!r} scores {score:.4g}, not less than the good picture's {float(output.scores[0]):.4g}"
            )
    return tuple(problems)


def main(arguments: Sequence[str] | None = None, *, parts: Parts | None = None) -> int:
    """Test a reward and print what came out; 0 when all is well, 1 when not.

    Args:
        arguments: of `rlt2i reward test`.
        parts: the short names of rewards.

    Raises:
        ValueError: for `--good` without `--bad`, or the reverse.
    """
    options = parser().parse_args(arguments)
    if bool(options.good) != bool(options.bad):
        raise ValueError("reward test: --good and --bad belong together.")
    reward = named_reward(options.name, options.set, parts=parts)
    if options.released or options.expect or options.record:
        try:
            return check(reward, expect=options.expect, record=options.record)
        finally:
            reward.close()
    try:
        verdict = judge_case(reward, _own_case(options) if options.good else case_for(reward))
    finally:
        reward.close()
    width = max(len(name) for name in verdict.names)
    for name, score, details in zip(verdict.names, verdict.scores, verdict.details, strict=True):
        print(f"{name:<{width}}  {score:>10.4f}  {json.dumps(dict(details), ensure_ascii=False, default=str)[:100]}")
    print(f"{verdict.seconds:.3f} s per image; the first run took {verdict.first_seconds:.1f} s")
    for problem in verdict.problems:
        print(f"WRONG: {problem}")
    print("not as it should be" if verdict.problems else "as it should be")
    return 1 if verdict.problems else 0


def _own_case(options: argparse.Namespace) -> Case:
    try:
        metadata = json.loads(options.metadata)
    except ValueError as error:
        raise ValueError(f"reward test --metadata: not JSON: {error}.") from None
    if not isinstance(metadata, dict):
        raise ValueError('reward test --metadata: write a JSON object, for example {"text": "OPEN"}.')
    good, bad = _picture(options.good), {path.name: _picture(path) for path in options.bad}
    if any(picture.shape != good.shape for picture in bad.values()):
        raise ValueError("reward test: all pictures must have one size, because they are scored as one batch.")
    return Case(prompt=options.prompt, metadata=metadata, good=good, bad=bad)


def _picture(path: Path) -> Tensor:
    try:
        return torch.from_numpy(read_picture(path)).permute(2, 0, 1).contiguous()
    except ImageFileError as error:
        raise ValueError(f"reward test: {path} {error}.") from None


def parser() -> argparse.ArgumentParser:
    """The options of `rlt2i reward test`."""
    words = argparse.ArgumentParser(prog="rlt2i reward test", description="Test a reward on a good and bad pictures.")
    words.add_argument("name", help="short name, module:Class, file.py:Class, or a YAML file with a reward or a recipe")
    words.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the reward; may be repeated"
    )
    words.add_argument("--good", type=Path, metavar="FILE", help="a picture of your own that should win")
    words.add_argument(
        "--bad", type=Path, metavar="FILE", action="append", help="one that should lose; may be repeated"
    )
    words.add_argument("--prompt", default="", help="of your own pictures")
    words.add_argument("--metadata", default="{}", metavar="JSON", help="of your own pictures")
    words.add_argument(
        "--released", action="store_true", help="fetch the released weights and compare them with what is recorded"
    )
    words.add_argument("--expect", type=Path, metavar="FILE", help="compare with this expectation file")
    words.add_argument("--record", type=Path, metavar="FILE", help="write what was found as an expectation file")
    return words
