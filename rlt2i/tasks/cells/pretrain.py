"""Trains the pipeline of the cells world, starting from that of the shapes world.

    rlt2i pretrain cells --out DIR --steps 1000 --seed 0

One model learns both grids and prompts that name one or two cells. Nearly half of its captions are wrong in one word,
so that the best it can learn is a strict score of .55: what the words mean is there, and reinforcement learning has
something to do. The autoencoder is that of the shapes world, unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import torch
from torch import Tensor

from rlt2i.tasks.cells.networks import WORLD
from rlt2i.tasks.cells.prompts import CellsPrompt, all_prompts, near_misses
from rlt2i.tasks.cells.render import render, sample_scenes
from rlt2i.tasks.cells.task import eval_prompts
from rlt2i.tasks.cells.verifier import verify
from rlt2i.tasks.cells.vocabulary import side
from rlt2i.tasks.embedded.command import run_command
from rlt2i.tasks.embedded.networks import encode_images, load_pipeline, tokenise
from rlt2i.tasks.embedded.pretraining import Run, Schedule, Scores, fit, generator_for, open_log, sample_texts
from rlt2i.tasks.shapes.networks import PIPELINE_DIR as SHAPES_PIPELINE_DIR

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

KINDS: Final = {(2, 1): 0.50, (2, 2): 0.15, (3, 1): 0.30, (3, 2): 0.05}
"""(cells along a side, cells named) -> share of the training data."""

CAPTION_NOISE: Final = 0.45
"""Share of scenes drawn for a near miss of their caption: one named shape or colour is another."""

CAPTION_DROPOUT: Final = 0.05
"""Share of captions replaced by the empty one, for classifier-free guidance."""


@attrs.frozen(kw_only=True)
class Evaluation(Scores):
    """Scores of a model on held-out prompts that name one cell of the grid of 2 x 2, and on the other kinds.

    Attributes:
        strict_by_category: Share of right images for each named cell.
        strict_by_kind: "2 x 2, two named" and so on -> share of right images.
    """

    strict_by_category: dict[str, float]
    strict_by_kind: dict[str, float]


def evaluate(pipeline: StableDiffusion3Pipeline, *, images: int = 240, seed: int = 0) -> Evaluation:
    """Judge samples for held-out prompts, 10 Euler steps, without guidance.

    Args:
        pipeline: A float32 pipeline.
        images: Of each kind; 240 make a standard error of .03.
        seed: Of the initial noise. The same seed compares two models on the same noise.
    """
    strict: dict[tuple[int, int], Tensor] = {}
    partial: dict[tuple[int, int], Tensor] = {}
    for grid, named in KINDS:
        prompts = eval_prompts(grid, named, images)
        noise = generator_for(seed, "evaluation", grid, named)
        drawn = sample_texts(pipeline, [prompt.text for prompt in prompts], canvas=side(grid), generator=noise)
        verdict = verify(drawn, prompts)
        strict[grid, named], partial[grid, named] = verdict.strict, verdict.partial
    categories = [prompt.category for prompt in eval_prompts(2, 1, images)]
    rows = {
        name: [i for i, category in enumerate(categories) if category == name] for name in dict.fromkeys(categories)
    }
    return Evaluation(
        strict=strict[2, 1].mean().item(),
        partial=partial[2, 1].mean().item(),
        strict_by_category={name: strict[2, 1][members].mean().item() for name, members in rows.items()},
        strict_by_kind={f"{g} x {g}, {('one', 'two')[n - 1]} named": s.mean().item() for (g, n), s in strict.items()},
    )


def _draw(grid: int, count: int, generator: torch.Generator) -> tuple[list[CellsPrompt], Tensor]:
    """`count` captions of one grid and [count, 3, S, S] images that a careless annotator would give them."""
    share = KINDS[grid, 2] / (KINDS[grid, 1] + KINDS[grid, 2])
    two, which, noisy, choice = torch.rand(4, count, generator=generator).tolist()
    captions = []
    for t, w in zip(two, which, strict=True):
        prompts = all_prompts(grid, 2 if t < share else 1)
        captions.append(prompts[int(w * len(prompts))])
    wrong = {prompt: near_misses(prompt) for prompt in set(captions)}
    shown = [
        wrong[p][int(c * len(wrong[p]))] if u < CAPTION_NOISE else p
        for p, u, c in zip(captions, noisy, choice, strict=True)
    ]
    chunks = [shown[i : i + 512] for i in range(0, count, 512)]
    return captions, torch.cat([render(sample_scenes(chunk, generator), generator) for chunk in chunks])


@torch.no_grad()
def _warm_start(run: Run) -> None:
    """Copy what the shapes world's pipeline knows: the transformer, both text encoders, and its words' embeddings."""
    source = load_pipeline(SHAPES_PIPELINE_DIR)
    known, ours = source.tokenizer.get_vocab(), run.pipeline.tokenizer.get_vocab()
    shared = sorted(known.keys() & ours.keys())
    rows, source_rows = [ours[word] for word in shared], [known[word] for word in shared]
    for pipeline in (run.pipeline, run.averaged):
        for part in ("transformer", "text_encoder", "text_encoder_2"):
            values = dict(getattr(source, part).named_parameters())
            for name, parameter in getattr(pipeline, part).named_parameters():
                if name.endswith("token_embedding.weight"):
                    parameter[rows] = values[name][source_rows]
                elif name.endswith("position_embedding.weight"):
                    parameter[: len(values[name])] = values[name]
                else:
                    parameter.copy_(values[name])


SCHEDULE: Final = Schedule(steps=1_000, learning_rate=2e-3, eval_every=500, target=1.0)
"""That of the shipped pipeline."""


def pretrain(
    out_dir: Path,
    schedule: Schedule = SCHEDULE,
    *,
    seed: int = 0,
    pool_size: int = 8_192,
    pool_steps: int = 500,
    images: int = 240,
    compile_blocks: bool = True,
) -> Evaluation:
    """Train the pipeline, or go on with a run that was interrupted.

    Args:
        out_dir: Where the pipeline directory is written; created if need be.
        schedule: How long and how fast.
        seed: Everything random derives from it. On one machine, equal arguments give equal weights.
        pool_size: Scenes of each grid drawn and encoded at once.
        pool_steps: Updates before new pools are drawn.
        images: Images per evaluation, of each kind.
        compile_blocks: Compile the transformer blocks; needs a C++ compiler, and a minute.

    Returns:
        Scores of the saved float16 pipeline, after loading it back.
    """
    log = open_log(out_dir)
    autoencoder = load_pipeline(SHAPES_PIPELINE_DIR).vae.eval().requires_grad_(False)
    run = Run(autoencoder, WORLD, seed=seed, compile_blocks=compile_blocks)
    _warm_start(run)
    empty = tokenise(run.pipeline.tokenizer, [""])

    @functools.lru_cache(maxsize=2)
    @torch.no_grad()
    def pool(grid: int, number: int) -> tuple[Tensor, Tensor]:
        prompts, scenes = _draw(grid, pool_size, generator_for(seed, "pool", grid, number))
        latents = torch.cat([encode_images(autoencoder, chunk) for chunk in scenes.split(256)])
        return latents, tokenise(run.pipeline.tokenizer, [prompt.text for prompt in prompts])

    def draw(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
        small = torch.rand((), generator=generator).item() < KINDS[2, 1] + KINDS[2, 2]
        latents, token_ids = pool(2 if small else 3, step // pool_steps)
        rows = torch.randint(pool_size, (schedule.batch_size,), generator=generator)
        dropped = torch.rand(schedule.batch_size, 1, generator=generator) < CAPTION_DROPOUT
        return latents[rows], torch.where(dropped, empty, token_ids[rows])

    return fit(
        run,
        schedule,
        out_dir=out_dir,
        log=log,
        draw=draw,
        judge=lambda pipeline: evaluate(pipeline, images=images),
        judge_shipped=lambda pipeline: evaluate(pipeline, images=2 * images, seed=1),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `pretrain`."""
    run_command(pretrain, SCHEDULE, arguments, world="cells", about=__doc__)


if __name__ == "__main__":
    main()
