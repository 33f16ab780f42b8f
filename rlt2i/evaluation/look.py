"""`rlt2i look`: base and trained side by side, for any prompt and seed, with the maps of each."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from rlt2i.evaluation.inspection import (
    Weights,
    drawing,
    find_weights,
    load_policy,
    map_of,
    uniform_in_space,
    why_no_map,
)
from rlt2i.inputs.textfiles import has_suffix
from rlt2i.interfaces import Policy
from rlt2i.recipes.recipe import Recipe
from rlt2i.report.grids import image_grid
from rlt2i.report.look import Seen, render_look
from rlt2i.runs.artifacts import MapSample
from rlt2i.runs.files import replace_text
from rlt2i.tasks.base import TaskPrompt
from rlt2i.tasks.reading import report_on
from rlt2i.types import Prompts


@attrs.frozen(kw_only=True, eq=False)
class _Drawn:
    """What one policy draws: an image [3, H, W] of every prompt and seed, and its map where there is one."""

    images: Sequence[Tensor]
    maps: Sequence[MapSample | None]


def look(
    recipe: Recipe,
    texts: Sequence[str],
    out: Path,
    *,
    run_dir: Path | None = None,
    checkpoint: Path | None = None,
    weights: Weights = "best",
    seeds: Sequence[int] = (0,),
    num_steps: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Draw prompts and seeds with the base and with trained weights, from the same noise, and lay them side by side.

    The images are those of `rlt2i sample --seed SEED --count 1`, the maps those of `rlt2i maps --seed SEED`.

    Args:
        out: a page (.html) with maps where the credit has some, or a picture without.
        num_steps: of images and maps; default those of the recipe's evaluation and of its sampler.
        say: told what a text encoder does not read of the prompts.

    Returns:
        `out`.

    Raises:
        ValueError: when there are no trained weights to look at.
        CheckpointError: when they cannot be read.
    """
    source = find_weights(run_dir=run_dir, checkpoint=checkpoint, weights=weights)
    if source is None:
        raise ValueError(
            "look: shows trained weights beside the base, and there are none. Name a run directory or a --checkpoint, "
            "or draw the base alone: rlt2i sample"
        )
    path, which = source
    page = has_suffix(out, ".html", ".htm")
    note = why_no_map(recipe) if page else "a picture"
    texts, seeds = list(dict.fromkeys(texts)), list(dict.fromkeys(seeds))
    drawn: list[_Drawn] = []
    both: tuple[Weights, ...] = ("base", which)
    for name in both:
        policy = load_policy(recipe, run_dir=run_dir, checkpoint=checkpoint, weights=name)
        if not drawn:
            for line in report_on(policy, [TaskPrompt(text=text) for text in texts]).lines():
                say(line)
        drawn.append(_draw(recipe, policy, texts, seeds, num_steps=num_steps, mapped=not note))
        del policy  # two large policies need not fit into memory at once
    base, trained = drawn
    pairs = [torch.stack(pair) for pair in zip(base.images, trained.images, strict=True)]
    places = [(text, seed) for text in texts for seed in seeds]
    out.parent.mkdir(parents=True, exist_ok=True)
    if not page:
        captions = [f"{name}, seed {seed}: {text}" for text, seed in places for name in ("base", "trained")]
        image_grid(torch.cat(pairs), captions=captions, columns=2, side=256).save(out)
        return out
    maps = [[m for m in pair if m is not None] for pair in zip(base.maps, trained.maps, strict=True)]
    if not note and not any(maps):
        note = uniform_in_space(recipe)
    pictures = [
        Seen(prompt=text, seed=seed, images=images, maps=mapped)
        for (text, seed), images, mapped in zip(places, pairs, maps, strict=True)
    ]
    home = run_dir.resolve().name if run_dir is not None else recipe.name
    steps = recipe.train.eval_steps if num_steps is None else num_steps
    weights_named = f"the {'average' if which == 'ema' else which} weights of {path.name}"
    notes = [f"No maps: {note}"] if note else []
    command = ["rlt2i", "look", home, *(word for text in texts for word in ("--prompt", text))]
    command += ["--seed", *map(str, seeds)]
    command += [] if num_steps is None else ["--steps", str(num_steps)]
    command += [] if checkpoint is None else ["--checkpoint", checkpoint.name]
    command += [] if weights == "best" else ["--weights", weights]
    replace_text(
        out,
        render_look(pictures, name=home, command=shlex.join(command), weights=weights_named, steps=steps, notes=notes),
    )
    return out


def _draw(
    recipe: Recipe,
    policy: Policy,
    texts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int | None,
    mapped: bool,
) -> _Drawn:
    """Every prompt with every seed."""
    steps = recipe.train.eval_steps if num_steps is None else num_steps
    images: dict[tuple[str, int], Tensor] = {}
    for seed in seeds:
        for text in texts:  # by itself, so that it is number 0 and its noise that of `sample`
            images[text, seed] = drawing(recipe, steps, seed).images(policy, Prompts.of([text]))[0].cpu()
    places = [(text, seed) for text in texts for seed in seeds]
    return _Drawn(
        images=[images[place] for place in places],
        maps=[
            map_of(recipe, policy, text, num_steps=num_steps, seed=seed) if mapped else None for text, seed in places
        ],
    )
