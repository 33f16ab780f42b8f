"""Trains the embedded pipeline from nothing: an autoencoder, then text encoders and transformer together.

    python -m rlt2i.tasks.shapes.pretrain --out DIR --steps 9000 --seed 0

The result is deliberately a mediocre model: training stops when the strict score reaches --target or the steps
run out, which leaves reinforcement learning something to do. The shipped weights ran out of steps, at .40.

Every random draw is a function of (seed, purpose, step), so a run that was killed continues as if nothing had
happened. Files are safetensors and JSON; nothing is pickled.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
from torch import Tensor

from rlt2i.tasks.embedded.command import run_command
from rlt2i.tasks.embedded.networks import build_autoencoder, decode_latents, encode_images, tokenise
from rlt2i.tasks.embedded.pretraining import Logbook, Run, Schedule, Scores, fit, generator_for, open_log, sample_texts
from rlt2i.tasks.shapes.networks import WORLD
from rlt2i.tasks.shapes.prompts import ShapesPrompt, all_prompts, eval_prompts, near_misses
from rlt2i.tasks.shapes.render import render, sample_scenes
from rlt2i.tasks.shapes.verifier import verify
from rlt2i.tasks.shapes.vocabulary import CANVAS, CATEGORIES

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline

Log = Callable[[dict[str, Any]], None]

CATEGORY_WEIGHTS: Final = {
    "single_object": 0.08,
    "two_object": 0.14,
    "counting": 0.20,
    "colors": 0.13,
    "position": 0.22,
    "color_attr": 0.23,
}
"""How often training draws each category: hard ones more often."""

CAPTION_NOISE: Final = 0.10
"""Share of scenes drawn for a near miss of their caption."""

CAPTION_DROPOUT: Final = 0.08
"""Share of captions replaced by the empty one, for classifier-free guidance."""


@attrs.frozen(kw_only=True)
class Evaluation(Scores):
    """Scores of a model on held-out prompts.

    Attributes:
        strict_by_category: Share of right images, per category.
        objects: Mean number of coloured objects per image.
        objects_wanted: Mean number that the prompts ask for.
    """

    strict_by_category: dict[str, float]
    objects: float
    objects_wanted: float


# Data ---------------------------------------------------------------------------------------------------------------


def _draw_prompts(n: int, generator: torch.Generator) -> list[ShapesPrompt]:
    """Draw `n` prompts: a category by `CATEGORY_WEIGHTS`, then one of its prompts uniformly."""
    prompts = all_prompts()
    size = {category: sum(p.category == category for p in prompts) for category in CATEGORIES}
    weights = torch.tensor([CATEGORY_WEIGHTS[p.category] / size[p.category] for p in prompts])
    return [prompts[i] for i in torch.multinomial(weights, n, replacement=True, generator=generator).tolist()]


def _confused_captions(prompts: Sequence[ShapesPrompt], generator: torch.Generator) -> list[ShapesPrompt]:
    """Replace a `CAPTION_NOISE` share of the prompts by one of their near misses."""
    wrong = {prompt: near_misses(prompt) for prompt in set(prompts)}
    noisy, choice = torch.rand(2, len(prompts), generator=generator).tolist()
    return [
        wrong[p][int(c * len(wrong[p]))] if u < CAPTION_NOISE else p
        for p, u, c in zip(prompts, noisy, choice, strict=True)
    ]


def _draw_images(prompts: Sequence[ShapesPrompt], generator: torch.Generator) -> Tensor:
    """[N, 3, 32, 32] one fresh image per prompt."""
    chunks = [prompts[i : i + 512] for i in range(0, len(prompts), 512)]
    return torch.cat([render(sample_scenes(chunk, generator), generator) for chunk in chunks])


@torch.no_grad()
def _draw_latents(n: int, autoencoder: AutoencoderKL, generator: torch.Generator) -> tuple[Tensor, list[ShapesPrompt]]:
    """[N, 4, 16, 16] latents and the captions they are trained under."""
    prompts = _draw_prompts(n, generator)
    images = _draw_images(_confused_captions(prompts, generator), generator)
    return torch.cat([encode_images(autoencoder, chunk) for chunk in images.split(256)]), prompts


# Autoencoder --------------------------------------------------------------------------------------------------------


def pretrain_autoencoder(
    *,
    seed: int,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    log: Log = lambda record: None,
) -> AutoencoderKL:
    """Train the autoencoder from nothing on drawn scenes.

    The loss is L1 + L2 + 0.003 KL per latent element. Afterwards `shift_factor` and `scaling_factor` are set
    such that latents of the world have mean 0 and standard deviation 1.

    Args:
        seed: Everything random derives from it.
        steps: Updates; 1,200 give about 36 dB, 2,400 about 40.
        batch_size: Images per update.
        learning_rate: Peak of a schedule that rises linearly over 5 % of the steps and falls as a cosine.
        log: Receives one JSON-able record every 100 steps and one at the end.

    Returns:
        A float32 autoencoder in evaluation mode, without gradients.
    """
    generator = generator_for(seed, "autoencoder")
    autoencoder = build_autoencoder(CANVAS, generator).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.99))
    pool = _draw_images(_draw_prompts(min(8192, steps * batch_size), generator), generator)
    start = time.perf_counter()
    for step in range(steps):
        rise, fall = (step + 1) / max(1, steps * 0.05), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * min(rise, 1.0) * fall
        images = pool[torch.randint(len(pool), (batch_size,), generator=generator)]
        scaled = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(scaled).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        error = autoencoder.decode(posterior.mean + posterior.std * noise).sample - scaled
        kl = posterior.kl().sum() / posterior.mean.numel()
        loss = error.abs().mean() + error.square().mean() + 3e-3 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            log({"phase": "autoencoder", "step": step, "loss": loss.item(), "seconds": time.perf_counter() - start})

    autoencoder.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(chunk * 2 - 1).latent_dist.mean for chunk in pool[:2048].split(256)])
        autoencoder.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
        error = decode_latents(autoencoder, encode_images(autoencoder, pool[:512])) - pool[:512]
    log(
        {
            "phase": "autoencoder",
            "step": steps,
            "psnr_db": -10 * error.square().mean().log10().item(),
            "seconds": time.perf_counter() - start,
        }
    )
    return autoencoder


# Evaluation ---------------------------------------------------------------------------------------------------------


def evaluate(pipeline: StableDiffusion3Pipeline, *, images_per_category: int = 80, seed: int = 0) -> Evaluation:
    """Judge samples for held-out prompts under the exclusive rule.

    Args:
        pipeline: A float32 pipeline.
        images_per_category: There are six categories; 80 make 480 images and a standard error near .02.
        seed: Of the initial noise. The same seed compares two models on the same noise.

    Returns:
        Scores, as plain floats.
    """
    prompts = eval_prompts(images_per_category)
    images = sample_texts(
        pipeline, [prompt.text for prompt in prompts], canvas=CANVAS, generator=generator_for(seed, "evaluation")
    )
    verdict = verify(images, prompts)
    strict = verdict.strict.view(len(CATEGORIES), -1).mean(1)
    return Evaluation(
        strict=strict.mean().item(),
        partial=verdict.partial.mean().item(),
        strict_by_category=dict(zip(CATEGORIES, strict.tolist(), strict=True)),
        objects=verdict.num_objects.float().mean().item(),
        objects_wanted=sum(prompt.count for prompt in prompts) / len(prompts),
    )


SCHEDULE: Final = Schedule(steps=9_000, learning_rate=1.5e-3, eval_every=1_000, target=0.55)
"""That of the shipped pipeline."""


def pretrain(
    out_dir: Path,
    schedule: Schedule = SCHEDULE,
    *,
    seed: int = 0,
    autoencoder_steps: int = 2_400,
    pool_size: int = 32_768,
    pool_steps: int = 4_000,
    images_per_category: int = 80,
    compile_blocks: bool = True,
) -> Evaluation:
    """Train the embedded pipeline from nothing, or go on with a run that was interrupted.

    Every `schedule.eval_every` steps the averaged weights are judged on held-out prompts, without guidance. The
    snapshot whose strict score is nearest to `schedule.target` is kept in `out_dir` as a pipeline directory, and
    training stops when the score reaches `schedule.target`. `out_dir/pretrain_log.jsonl` records loss and scores;
    `out_dir/state` holds what is needed to resume, and goes when training is done.

    Args:
        out_dir: Where the pipeline directory is written; created if need be.
        schedule: How long and how fast.
        seed: Everything random derives from it. On one machine, equal arguments give equal weights.
        autoencoder_steps: Updates of the autoencoder, which comes first.
        pool_size: Scenes drawn and encoded at once.
        pool_steps: Updates before a new pool is drawn.
        images_per_category: Images per evaluation, for each of six categories.
        compile_blocks: Compile the transformer blocks; needs a C++ compiler, and half a minute.

    Returns:
        Scores of the saved float16 pipeline, after loading it back.
    """
    log = open_log(out_dir)
    autoencoder = _own_autoencoder(out_dir / "state" / "autoencoder", seed, autoencoder_steps, log)
    run = Run(autoencoder, WORLD, seed=seed, compile_blocks=compile_blocks)
    empty = tokenise(run.pipeline.tokenizer, [""])

    @functools.lru_cache(maxsize=1)
    def pool(number: int) -> tuple[Tensor, Tensor]:
        latents, prompts = _draw_latents(pool_size, autoencoder, generator_for(seed, "pool", number))
        return latents, tokenise(run.pipeline.tokenizer, [prompt.text for prompt in prompts])

    def draw(generator: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
        latents, token_ids = pool(step // pool_steps)
        rows = torch.randint(pool_size, (schedule.batch_size,), generator=generator)
        dropped = torch.rand(schedule.batch_size, 1, generator=generator) < CAPTION_DROPOUT
        return latents[rows], torch.where(dropped, empty, token_ids[rows])

    return fit(
        run,
        schedule,
        out_dir=out_dir,
        log=log,
        draw=draw,
        judge=lambda pipeline: evaluate(pipeline, images_per_category=images_per_category),
        judge_shipped=lambda pipeline: evaluate(pipeline, images_per_category=2 * images_per_category, seed=1),
    )


def _own_autoencoder(directory: Path, seed: int, steps: int, log: Logbook) -> AutoencoderKL:
    """The autoencoder of this run: loaded if it is already trained, trained and saved if not."""
    from diffusers import AutoencoderKL

    if not directory.exists():
        trained = pretrain_autoencoder(seed=seed, steps=steps, log=log)
        trained.save_pretrained(directory.with_suffix(".partial"))
        directory.with_suffix(".partial").rename(directory)
    return AutoencoderKL.from_pretrained(directory, use_safetensors=True).eval().requires_grad_(False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `pretrain`."""
    run_command(pretrain, SCHEDULE, arguments, world="shapes", about=__doc__)


if __name__ == "__main__":
    main()
