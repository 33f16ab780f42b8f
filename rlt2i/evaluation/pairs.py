"""A pair file from a policy and a reward: the best and the worst of a few images of every training prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlt2i.config import to_mapping
from rlt2i.evaluation.best_worst import best_worst_pairs
from rlt2i.evaluation.draw import Draw
from rlt2i.inputs.textfiles import read_objects
from rlt2i.interfaces import Policy
from rlt2i.recipes.recipe import Recipe
from rlt2i.rewards.agreement import FailureCounts
from rlt2i.runs.files import remove_partials, replace_text, replacing
from rlt2i.seeds import derive_seed
from rlt2i.tasks.base import TaskPrompt, as_prompts, check_metadata

PAIRS = "pairs.jsonl"
SETTINGS = "settings.json"


def make_pairs(
    recipe: Recipe,
    policy: Policy,
    folder: Path,
    *,
    prompts: int,
    images: int = 4,
    seed: int = 0,
    num_steps: int | None = None,
    weights: str = "base",
    say: Callable[[str], None] = print,
) -> int:
    """Draw images of training prompts with the ODE, score them, and keep the best and the worst of each prompt.

    Every batch of prompts is written before the next is drawn, so a run that was cut off goes on where it stopped and
    ends with the same files. Prompts whose images score alike give no pair.

    Args:
        policy: of the recipe, loaded.
        folder: gets `pairs.jsonl`, `images/` and `settings.json`, which says how they were made.
        prompts: how many of the task's stream.
        images: drawn of each.
        seed: of prompts and images.
        num_steps: of the ODE; None takes the recipe's `train.eval_steps`.
        weights: what the policy carries, for `settings.json`.

    Returns:
        How many pairs the file holds.

    Raises:
        ValueError: when the folder holds pairs that were made otherwise, or no prompt gave a pair.
    """
    if images < 2:
        raise ValueError(f"images={images}: a pair is two images. Use images >= 2; more of them lie further apart.")
    check_metadata(recipe.task, recipe.reward)
    recipe.task.check_image_size(recipe.train.image_size)
    steps = recipe.train.eval_steps if num_steps is None else num_steps
    settings = pair_settings(recipe, images=images, seed=seed, num_steps=steps, weights=weights)
    rows = _begun(folder, settings)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    replace_text(folder / SETTINGS, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    per_batch = max(1, recipe.train.rollout_batch_size // images)
    first = max((row["draw"] for row in rows), default=-1) + 1
    if first >= prompts:
        say(f"{folder}: all {prompts} prompts are drawn already, with {len(rows)} pairs")
    elif first:
        say(f"{folder}: {len(rows)} pairs are there; going on with prompt {first + 1} of {prompts}")
    for start in range(first, prompts, per_batch):
        drawn = recipe.task.train_prompts(seed=seed, start=start, count=min(per_batch, prompts - start))
        rows += _batch(recipe, policy, folder, drawn, start=start, images=images, seed=seed, num_steps=steps)
        if rows:
            replace_text(folder / PAIRS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        say(f"{min(start + per_batch, prompts)} of {prompts} prompts, {len(rows)} pairs")
    if not rows:
        raise ValueError(
            f"{prompts} prompts with {images} images each gave no pair: {type(recipe.reward).__name__} scores all "
            "images of a prompt alike. Draw more images, or use a reward that tells them apart."
        )
    return len(rows)


def _batch(
    recipe: Recipe,
    policy: Policy,
    folder: Path,
    drawn: list[TaskPrompt],
    *,
    start: int,
    images: int,
    seed: int,
    num_steps: int,
) -> list[dict[str, Any]]:
    """The rows of one batch of prompts, after their images are on the disk."""
    train = recipe.train
    prompts = as_prompts(drawn, group_size=images, start=start)
    draw = Draw(
        seed=derive_seed("pairs", seed),
        num_steps=num_steps,
        image_size=train.image_size,
        rollout_batch_size=train.rollout_batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    judged = draw.judged(policy, recipe.reward, prompts)
    pictures, output = judged.images, judged.output
    if not output.valid.any():
        raise ValueError(
            f"pairs: the reward could judge none of {len(output.valid)} images. Why: {FailureCounts.of(output)}. "
            "What was made before is there; mend the reward and run the command again."
        )
    chosen = best_worst_pairs(output.scores, images, valid=output.valid)
    rows = []
    for i, prompt in enumerate(drawn):
        if not chosen.distinct[i]:
            continue
        row: dict[str, Any] = {
            **prompt.metadata,
            "prompt": prompt.text,
            "core": list(prompt.core),
            "category": prompt.category,
            "draw": start + i,
        }
        for role, rollouts in (("winner", chosen.winner), ("loser", chosen.loser)):
            name = f"images/{start + i:06d}-{role}.png"
            write_png(folder / name, pictures[rollouts[i]])
            row |= {role: name, f"{role}_score": float(output.scores[rollouts[i]])}
        rows.append(row)
    return rows


def pair_settings(recipe: Recipe, *, images: int, seed: int, num_steps: int, weights: str) -> dict[str, Any]:
    """How the images of a pair file were made, for `settings.json`."""
    from rlt2i.recipes import PARTS

    parts = {name: to_mapping(getattr(recipe, name), parts=PARTS) for name in ("policy", "reward", "task")}
    return {
        "recipe": recipe.name,
        "weights": weights,
        "images": images,
        "seed": seed,
        "num_steps": num_steps,
        "image_size": recipe.train.image_size,
        **parts,
    }


def _begun(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that are there already."""
    if not (folder / PAIRS).is_file():
        return []
    check_pair_settings(folder, settings)
    return [row for _, row in read_objects(folder / PAIRS)]


def check_pair_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix pairs that were made in different ways.

    Raises:
        ValueError: naming the settings that differ from those written down in the folder.
    """
    made = json.loads((folder / SETTINGS).read_text(encoding="utf-8")) if (folder / SETTINGS).is_file() else {}
    differing = sorted(key for key in settings if made.get(key) != json.loads(json.dumps(settings[key])))
    if differing:
        raise ValueError(
            f"{folder}: holds pairs that were made with other settings ({', '.join(differing)}). Use an empty folder, "
            "or the same command to go on."
        )


def write_png(file: Path, picture: Tensor) -> None:
    """Write a [3, H, W] uint8 image, in one step."""
    from PIL import Image

    with replacing(file) as partial:
        Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(partial, format="PNG")
