"""The second stage of an evaluation: judge saved images. It can be repeated with other rewards, without the policy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlt2i.evaluation.suites.folder import REWARDS, EvaluationError, Folder, PartWriter, Record, Shard, scores_of
from rlt2i.interfaces import Reward, RewardBatch
from rlt2i.rewards.batching import REASON, split_rows
from rlt2i.rewards.validity import score_safely
from rlt2i.runs.files import plain_json, replace_text

IMAGES_PER_CHUNK = 32
"""Images that a reward is given together."""


def claim_reward(folder: Folder, name: str, reward: Reward, *, rescore: bool) -> None:
    """Write down which reward gives the scores called `name`, or check that it is the same as before.

    Args:
        rescore: forget the scores that are there.

    Raises:
        EvaluationError: when they are of another reward.
    """
    path = folder.path / REWARDS / f"{name}.json"
    text = json.dumps(json.loads(json.dumps(reward.fingerprint(), default=str)), indent=1, sort_keys=True) + "\n"
    if rescore:
        for part in folder.part_files(scores_of(name)):
            part.unlink()
    elif path.is_file() and path.read_text(encoding="utf-8") != text and folder.part_files(scores_of(name)):
        raise EvaluationError(
            f"{path}: the scores called {name!r} are of a reward with other settings or weights. "
            f"Score again with --rescore {name}, or add it under another name: --reward NAME=REWARD."
        )
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        replace_text(path, text)


def share_of(reward: Reward, drawn: Sequence[Record], shard: Shard) -> list[Record]:
    """The images that this process judges: whole prompts where a reward compares the images of one."""
    if reward.scope == "sample":
        return shard.of(drawn)
    prompts = set(shard.of(list(dict.fromkeys(record["prompt"] for record in drawn))))
    return [record for record in drawn if record["prompt"] in prompts]


def score(
    folder: Folder,
    name: str,
    reward: Reward,
    drawn: Sequence[Record],
    *,
    writer: PartWriter,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Judge the given images, without those whose score is there.

    A reward that raises, or returns what cannot be trusted, makes the images concerned invalid: their score is null,
    with the reason beside it, and they enter no mean.
    """
    done = folder.records(scores_of(name))
    missing = [record for record in drawn if record["id"] not in done]
    advance(len(drawn) - len(missing))
    whole = RewardBatch(  # only to be cut; the images are read chunk by chunk
        images=torch.empty(len(missing), 3, 1, 1, dtype=torch.uint8),
        prompts=[record["prompt"] for record in missing],
        metadata=[record["metadata"] for record in missing],
    )
    for rows in split_rows(whole, IMAGES_PER_CHUNK, scope=reward.scope):
        records = [missing[row] for row in rows]
        numbers: dict[str, int] = {}
        groups = [numbers.setdefault(record["prompt"], len(numbers)) for record in records]
        batch = RewardBatch(
            images=folder.read_images(records).to(device),
            prompts=[record["prompt"] for record in records],
            metadata=[record["metadata"] for record in records],
            groups=torch.tensor(groups),
            # Images of other weights bear the same ids; a server that remembers ids must not mix them up.
            ids=[f"{record['sha256'][:24]}/{record['id']}" for record in records],
        )
        output = score_safely(reward, batch)
        writer.append(
            _score_record(
                record["id"],
                float(output.scores[i]) if output.valid[i] else None,
                {part: float(values[i]) for part, values in output.components.items()},
                output.info[i] if output.info is not None else {},
            )
            for i, record in enumerate(records)
        )
        advance(len(rows))


def _score_record(
    name: str, value: float | None, components: Mapping[str, float], info: Mapping[str, Any]
) -> dict[str, Any]:
    record: dict[str, Any] = {"id": name, "score": value}
    if value is None:
        return record | {"reason": str(info.get(REASON, "the reward could not judge this image"))}
    record["components"] = {part: v if math.isfinite(v) else None for part, v in components.items()}
    try:
        return record | ({"info": plain_json(info, "info")} if info else {})
    except ValueError:  # details that are no JSON are worth less than the score
        return record
