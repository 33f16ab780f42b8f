"""`rlt2i reward test NAME --released`: do the released weights give here what they gave where they were recorded?

Formulas and conversions are tested on random weights; whether the *released* ones give the right numbers, only
somebody with the network can see. This scores the bundled pictures, and compares the files' SHA-256 and the scores
with an expectation file, or writes one where nothing has been recorded.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import attrs
import torch

from rlt2i.config import to_mapping
from rlt2i.interfaces import Reward, RewardBatch
from rlt2i.rewards.batching import REASON
from rlt2i.rewards.selftest_cases import Case, beauty_case, drawing_case, objects_case, text_case
from rlt2i.rewards.sizes import WEIGHT_FIELDS
from rlt2i.rewards.validity import score_safely
from rlt2i.rewards.weights import SOURCE_FILE, find_weights
from rlt2i.rewards.wrapper import Wrapper

FOLDER: Final = Path(__file__).parent / "expectations"
"""Expectation files that ship, <class name>.json; there is none until somebody has recorded it."""

TOLERANCES: Final[Mapping[str, float]] = {
    "Aesthetic": 0.02,
    "CLIPScore": 0.002,
    "GenEvalReward": 0.001,
    "HPSv2": 0.002,
    "HPSv3": 0.1,
    "ImageReward": 0.02,
    "PickScore": 0.05,
}
"""In the unit of the score: what another version of a library, or another device, may change."""


@attrs.frozen(kw_only=True)
class Expectation:
    """What a reward made of the bundled pictures, somewhere, with certain weights.

    Attributes:
        settings: the reward as a recipe writes it.
        files: weight file -> SHA-256.
        pictures: picture -> SHA-256 of its pixels; Pillow draws them, and another version may draw differently.
        scores: picture -> score.
        tolerance: by which a score may differ.
        versions, date: where and when it was recorded, for the reader.
    """

    settings: Mapping[str, Any]
    files: Mapping[str, str]
    pictures: Mapping[str, str]
    scores: Mapping[str, float]
    tolerance: float
    versions: Mapping[str, str] = attrs.field(factory=dict)
    date: str = ""

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(attrs.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Expectation:
        """The inverse of `write`.

        Raises:
            ValueError: when the file holds something else.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not an expectation file ({error}). Record it again with --record.") from None


def observe(reward: Reward) -> tuple[Expectation, tuple[str, ...]]:
    """Fetch the weights, hash their files and score the bundled pictures.

    Returns:
        What was found, and why pictures could not be scored.

    Raises:
        FileNotFoundError: when weights have to be converted first, with the command.
    """
    files = {name: _sha256(path) for name, path in weight_files(reward).items()}
    scores: dict[str, float] = {}
    pictures: dict[str, str] = {}
    problems: list[str] = []
    for case_name, case in cases_for(reward).items():
        images = {"good": case.good, **case.bad}
        batch = RewardBatch(
            images=torch.stack(list(images.values())),
            prompts=[case.prompt] * len(images),
            metadata=[case.metadata] * len(images),
        )
        output = score_safely(reward, batch)
        for row, (name, image) in enumerate(images.items()):
            key = f"{case_name}/{name}"
            pictures[key] = hashlib.sha256(image.numpy().tobytes()).hexdigest()
            if bool(output.valid[row]):
                scores[key] = round(float(output.scores[row]), 6)
            else:
                why = (output.info or [{}] * len(images))[row].get(REASON, "no reason given")
                problems.append(f"{key} was not scored: {why}")
    kind = type(_inside(reward)).__name__
    observed = Expectation(
        settings=to_mapping(reward),
        files=files,
        pictures=pictures,
        scores=scores,
        tolerance=TOLERANCES.get(kind, 0.01),
        versions={package: version(package) for package in ("torch", "transformers", "pillow")},
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    return observed, tuple(problems)


def differences(observed: Expectation, expected: Expectation) -> tuple[str, ...]:
    """What is not as it was recorded: weights first, because other weights explain other scores."""
    problems = []
    for name in sorted(observed.files.keys() | expected.files.keys()):
        here, there = observed.files.get(name), expected.files.get(name)
        if here != there:
            problems.append(f"{name} has SHA-256 {here}, recorded was {there}")
    for name in sorted(observed.pictures.keys() | expected.pictures.keys()):
        if observed.pictures.get(name) != expected.pictures.get(name):
            problems.append(f"the picture {name} is not the one that was recorded (another Pillow draws differently)")
    for name, score in expected.scores.items():
        if name in observed.scores and not abs(observed.scores[name] - score) <= expected.tolerance:
            problems.append(
                f"{name} scores {observed.scores[name]:.4f}, recorded was {score:.4f}; the tolerance is "
                f"{expected.tolerance:g}"
            )
    return tuple(problems)


def check(reward: Reward, *, expect: Path | None, record: Path | None) -> int:
    """Print what the released weights give; 0 when it is as recorded, or when nothing was recorded, 1 when not.

    Args:
        expect: expectation file; None looks among those that ship.
        record: file to write what was found to.

    Raises:
        ValueError: for a record that was made with other settings.
    """
    observed, problems = observe(reward)
    shipped = FOLDER / f"{type(_inside(reward)).__name__}.json"
    path = expect or (shipped if shipped.is_file() else None)
    expected = None if path is None else Expectation.read(path)
    for name, digest in observed.files.items():
        print(f"{digest}  {name}")
    width = max(map(len, observed.pictures))
    for name in observed.pictures:
        here = f"{observed.scores[name]:>10.4f}" if name in observed.scores else f"{'invalid':>10}"
        there = "" if expected is None or name not in expected.scores else f"  recorded {expected.scores[name]:.4f}"
        print(f"{name:<{width}}  {here}{there}")
    if expected is not None:
        if expected.settings != observed.settings:
            raise ValueError(
                f"{path}: recorded with the settings {dict(expected.settings)}, but this is {dict(observed.settings)}. "
                "Use the same, or record these with --record."
            )
        problems += differences(observed, expected)
    for problem in problems:
        print(f"WRONG: {problem}")
    if record is not None and not problems:
        observed.write(record)
        print(f"recorded in {record}")
    if problems:
        print("not as it should be")
        return 1
    if expected is None:
        print(
            "nothing has been recorded for this reward, so these numbers confirm nothing: compare them with the "
            "authors' own code, and keep them with --record FILE"
        )
    else:
        print(f"as recorded on {expected.date}")
    return 0


def cases_for(reward: Reward) -> dict[str, Case]:
    """Name -> pictures that a model reward is shown.

    Raises:
        ValueError: for a reward without weights, which needs no such check.
    """
    inside = _inside(reward)
    if not any(hasattr(inside, field) for field in WEIGHT_FIELDS):
        raise ValueError(
            f"reward test --released: {type(inside).__name__} has no released weights. Leave --released out."
        )
    if inside.metadata_keys:
        return {"objects": objects_case()}
    return {"drawing": drawing_case(), "beauty": beauty_case(), "objects": objects_case(), "text": text_case()}


def weight_files(reward: Reward) -> dict[str, Path]:
    """Name -> file with weights, downloaded where they are on the hub; `source` names the checkpoint they are from."""
    inside = _inside(reward)
    files: dict[str, Path] = {}
    for field in WEIGHT_FIELDS:
        where = getattr(inside, field, "")
        if not where:
            continue
        folder = Path(find_weights(where, of=type(inside).__name__))
        if not folder.exists():
            folder = _from_hub(str(folder), str(getattr(inside, "revision", "main")))
        for file in sorted(folder.rglob("*")):
            if file.suffix == ".safetensors" or file.name == SOURCE_FILE:
                files[f"{field}/{file.relative_to(folder).as_posix()}"] = file
    return files


def _from_hub(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted: Sequence[str] = ["*.safetensors", "*.json", "*.txt"]
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _inside(reward: Reward) -> Reward:
    """What a wrapper wraps."""
    while isinstance(reward, Wrapper):
        reward = reward.reward
    return reward
