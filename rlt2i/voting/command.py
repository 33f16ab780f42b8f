"""`rlt2i vote`: images of a policy, a person's votes on them, and a pair file for offline DPO."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from rlt2i.evaluation.draw import Draw
from rlt2i.evaluation.pairs import PAIRS, SETTINGS, check_pair_settings, pair_settings
from rlt2i.interfaces import Policy
from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.files import remove_partials, replace_text
from rlt2i.seeds import derive_seed
from rlt2i.tasks.base import TaskPrompt, as_prompts
from rlt2i.voting.booth import FAREWELL_SECONDS, Booth
from rlt2i.voting.folder import DRAWN, Slate, VoteFolder
from rlt2i.voting.page import ServedPage
from rlt2i.voting.reward import MOST

AHEAD = 24
"""Prompts that are drawn before they are voted on."""
UNDO_SECONDS = 5.0


@attrs.frozen(kw_only=True)
class Ballot:
    """What is put to the vote.

    Attributes:
        prompts: how many of the task's training stream, unless there are texts.
        texts: prompts of the user's own.
        images: drawn of each.
        seed: of prompts and images.
        num_steps: of the ODE.
        weights: what the policy carries, for `settings.json`.
    """

    prompts: int
    texts: Sequence[str] = ()
    images: int = attrs.field(default=2)
    seed: int = 0
    num_steps: int
    weights: str = "base"

    @images.validator
    def _check_images(self, _: Any, value: int) -> None:
        if not 2 <= value <= MOST:
            raise ValueError(f"--images {value}: a person compares 2 to {MOST} images of a prompt. Use 2, 3 or 4.")

    def drawn(self, recipe: Recipe, start: int, count: int) -> list[TaskPrompt]:
        """Prompts number `start` to `start + count`."""
        if self.texts:
            return [TaskPrompt(text=text) for text in self.texts[start : start + count]]
        return recipe.task.train_prompts(seed=self.seed, start=start, count=min(count, self.prompts - start))

    @property
    def count(self) -> int:
        """Of the prompts."""
        return len(self.texts) or self.prompts


def vote(
    recipe: Recipe,
    load: Callable[[], Policy],
    folder: Path,
    ballot: Ballot,
    *,
    port: int | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Draw images with the ODE and have a person vote on pairs of them, until all are voted on.

    Images are drawn a few prompts ahead, and what is drawn or voted on is on the disk at once, so the command goes on
    where it was cut off.

    Args:
        load: the policy; only called where something is left to draw.
        folder: gets `pairs.jsonl`, the images, the votes and `settings.json`, which says how they were made.
        port: of the page, see `ServedPage.open`.
        say: told where the page is, and what has come of it.

    Returns:
        How many pairs the file holds.

    Raises:
        ValueError: when the folder holds votes on images that were made otherwise.
    """
    recipe.task.check_image_size(recipe.train.image_size)
    settings = _settings(recipe, ballot)
    if (folder / PAIRS).is_file() or (folder / DRAWN).is_file():
        check_pair_settings(folder, settings)
    kept = VoteFolder(folder)
    remove_partials(folder)
    replace_text(folder / SETTINGS, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    booth = Booth(kept, planned=ballot.count)
    page = ServedPage.open(booth, port=port)
    say(f"vote on this machine at {page.url}")
    slates = kept.slates[: ballot.count]
    booth.ask(slates)
    if slates:
        say(f"{folder}: {len(slates)} of {ballot.count} prompts are drawn, {len(kept.votes)} votes are there")
    try:
        if len(slates) < ballot.count:
            slates += _draw(recipe, load(), booth, ballot, start=len(slates))
        booth.wait(slates, undo_s=UNDO_SECONDS if len(kept.votes) else 0.0)
        kept.write_pairs()
        rows = len(kept.pairs())
        booth.end(f"All {ballot.count} prompts are voted on, with {rows} pairs. You can close this page.")
        booth.linger(FAREWELL_SECONDS)
        return rows
    except KeyboardInterrupt as error:
        error.add_note(f"{len(kept.pairs())} pairs are in {folder / PAIRS}; the same command goes on")
        raise
    finally:
        page.close()


def _draw(recipe: Recipe, policy: Policy, booth: Booth, ballot: Ballot, *, start: int) -> list[Slate]:
    """Draw what is not there yet, no further ahead of the votes than `AHEAD`."""
    train, slates = recipe.train, []
    per_batch = max(1, min(train.rollout_batch_size // ballot.images, AHEAD))
    draw = Draw(
        seed=derive_seed("pairs", ballot.seed),
        num_steps=ballot.num_steps,
        image_size=train.image_size,
        rollout_batch_size=train.rollout_batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    for first in range(start, ballot.count, per_batch):
        booth.wait_for_room(AHEAD)
        drawn = ballot.drawn(recipe, first, per_batch)
        images = draw.images(policy, as_prompts(drawn, group_size=ballot.images, start=first))
        for i, prompt in enumerate(drawn):
            row = {**prompt.metadata, "core": list(prompt.core), "category": prompt.category, "draw": first + i}
            slates.append(booth.folder.keep(images[i * ballot.images : (i + 1) * ballot.images], prompt.text, row))
            booth.ask(slates[-1:])
    return slates


def _settings(recipe: Recipe, ballot: Ballot) -> dict[str, Any]:
    settings = pair_settings(
        recipe, images=ballot.images, seed=ballot.seed, num_steps=ballot.num_steps, weights=ballot.weights
    )
    del settings["reward"]
    return settings | {"judge": "a person", "texts": list(ballot.texts)}
