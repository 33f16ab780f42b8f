"""Trains the embedded pipeline from nothing: an autoencoder, then text encoders and transformer together.

    python -m rlt2i.tasks.shapes.pretrain --out DIR --steps 9000 --seed 0

The result is deliberately a mediocre model: training stops when the strict score reaches --target or the steps
run out, which leaves reinforcement learning something to do. The shipped weights ran out of steps, at .40.

Every random draw is a function of (seed, purpose, step), so a run that was killed continues as if nothing had
happened. Files are safetensors and JSON; nothing is pickled.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from rlt2i.tasks.shapes.networks import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    build_autoencoder,
    build_pipeline,
    decode_latents,
    encode_images,
    encode_text,
    load_pipeline,
    save_pipeline,
    tokenise,
)
from rlt2i.tasks.shapes.prompts import ShapesPrompt, all_prompts, eval_prompts, near_misses
from rlt2i.tasks.shapes.render import render, sample_scenes
from rlt2i.tasks.shapes.verifier import verify
from rlt2i.tasks.shapes.vocabulary import CATEGORIES

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

UNIFORM_SIGMAS: Final = 0.20
"""Share of noise levels drawn uniformly; the rest are logit-normal(0, 1.1)."""

WARMUP_STEPS: Final = 100
DECAY_FROM: Final = 0.6
"""Share of the steps after which the learning rate falls as a cosine."""


@attrs.frozen(kw_only=True)
class Evaluation:
    """Scores of a model on held-out prompts.

    Attributes:
        strict: Mean of `strict_by_category`.
        partial: Mean over categories of the partial score.
        strict_by_category: Share of right images, per category.
        objects: Mean number of coloured objects per image.
        objects_wanted: Mean number that the prompts ask for.
    """

    strict: float
    partial: float
    strict_by_category: dict[str, float]
    objects: float
    objects_wanted: float


# Data ---------------------------------------------------------------------------------------------------------------


def _generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator that is a function of (seed, purpose) alone."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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


# Optimisers ---------------------------------------------------------------------------------------------------------


class Muon:
    """Momentum orthogonalised by Newton-Schulz iterations, for the matrices of the transformer blocks.

    Matrices of one shape are updated in one batched product. An update has the root-mean-square of an AdamW
    update (0.2), so both optimisers share a learning rate.
    """

    def __init__(self, parameters: Iterable[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self._groups = list(by_shape.values())
        self._momenta = [torch.zeros(len(group), *group[0].shape) for group in self._groups]
        self._momentum = momentum
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter from its gradient."""
        for group, buffer in zip(self._groups, self._momenta, strict=True):
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            buffer.lerp_(gradient, 1 - self._momentum)
            update = orthogonalise(gradient.lerp(buffer, self._momentum))
            size = learning_rate * 0.2 * math.sqrt(max(group[0].shape))
            torch._foreach_mul_(group, 1 - learning_rate * self._weight_decay)
            torch._foreach_sub_(group, list((update * size).unbind()))

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `load_state` continues."""
        return {f"muon.{i}": buffer for i, buffer in enumerate(self._momenta)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        for i, buffer in enumerate(self._momenta):
            buffer.copy_(state[f"muon.{i}"])


def orthogonalise(matrices: Tensor) -> Tensor:
    """[N, a, b] -> [N, a, b] with the same singular vectors and singular values near one (Muon's quintic)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * (gram @ gram) - 4.7750 * gram) @ x
    return x.mT if tall else x


class _Adam:
    """AdamW without weight decay, whose state is a flat dict of tensors."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._optimizer = torch.optim.AdamW(list(parameters), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def step(self, learning_rate: float) -> None:
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        slots = self._optimizer.state_dict()["state"]
        return {f"adam.{i}.{name}": tensor for i, slot in slots.items() for name, tensor in slot.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            if key.startswith("adam."):
                _, i, name = key.split(".")
                slots.setdefault(int(i), {})[name] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": slots})


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
    generator = _generator(seed, "autoencoder")
    autoencoder = build_autoencoder(generator).to(memory_format=torch.channels_last)
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


@torch.no_grad()
def sample_images(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[ShapesPrompt],
    *,
    num_steps: int = 10,
    generator: torch.Generator,
    batch_size: int = 96,
) -> Tensor:
    """Sample with the Euler rule on an even sigma grid, without guidance.

    Args:
        pipeline: A float32 pipeline.
        prompts: B prompts.
        num_steps: Euler steps; sigma goes 1, 1 - 1/n, ..., 0.
        generator: Source of the initial noise.
        batch_size: Images per forward pass; the result does not depend on it.

    Returns:
        [B, 3, 32, 32] float32 images in [0, 1].
    """
    noise = torch.randn(len(prompts), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=generator)
    token_ids = tokenise(pipeline.tokenizer, [prompt.text for prompt in prompts])
    images = []
    for latents, ids in zip(noise.split(batch_size), token_ids.split(batch_size), strict=True):
        hidden, pooled = encode_text(pipeline, ids)
        for step in range(num_steps):
            timestep = torch.full((len(ids),), 1000 * (1 - step / num_steps))
            velocity = pipeline.transformer(latents, hidden, pooled, timestep).sample
            latents = latents - velocity / num_steps
        images.append(decode_latents(pipeline.vae, latents))
    return torch.cat(images)


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
    images = sample_images(pipeline, prompts, generator=_generator(seed, "evaluation"))
    verdict = verify(images, prompts)
    strict = verdict.strict.view(len(CATEGORIES), -1).mean(1)
    return Evaluation(
        strict=strict.mean().item(),
        partial=verdict.partial.mean().item(),
        strict_by_category=dict(zip(CATEGORIES, strict.tolist(), strict=True)),
        objects=verdict.num_objects.float().mean().item(),
        objects_wanted=sum(prompt.count for prompt in prompts) / len(prompts),
    )


# The run ------------------------------------------------------------------------------------------------------------


def _trained_parameters(pipeline: StableDiffusion3Pipeline) -> dict[str, Tensor]:
    """Name -> parameter of everything but the autoencoder."""
    parts = ("transformer", "text_encoder", "text_encoder_2")
    return {f"{part}.{name}": p for part in parts for name, p in getattr(pipeline, part).named_parameters()}


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it: a matrix of a transformer block, but not the modulation, whose rows are scales."""
    return parameter.ndim == 2 and "transformer_blocks" in name and "norm1" not in name


class _Run:
    """Everything that changes from step to step: networks, their running average, and both optimisers."""

    def __init__(self, autoencoder: AutoencoderKL, *, seed: int, compile_blocks: bool) -> None:
        self.step = 0
        self.pipeline = build_pipeline(autoencoder, _generator(seed, "weights"))
        self.averaged = build_pipeline(autoencoder, _generator(seed, "weights"))
        for network in (self.averaged.transformer, self.averaged.text_encoder, self.averaged.text_encoder_2):
            network.eval().requires_grad_(False)
        named = _trained_parameters(self.pipeline)
        self.parameters = list(named.values())
        self._averages = list(_trained_parameters(self.averaged).values())
        self._muon = Muon(p for name, p in named.items() if _is_block_matrix(name, p))
        self._adam = _Adam(p for name, p in named.items() if not _is_block_matrix(name, p))
        if compile_blocks:
            for block in self.pipeline.transformer.transformer_blocks:
                block.compile(fullgraph=True, dynamic=False)

    def update(self, loss: Tensor, *, learning_rate: float, average_decay: float) -> float:
        """Take one optimiser step and return the gradient's norm before clipping at 1."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._muon.step(learning_rate)
        self._adam.step(learning_rate)
        self.step += 1
        # A young average forgets faster, or it would remember the random initial weights.
        decay = min(average_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self.parameters, 1 - decay)
        return norm.item()

    def save(self, path: Path) -> None:
        """Write the whole state, atomically."""
        from safetensors.torch import save_file

        tensors = {f"average.{name}": p for name, p in _trained_parameters(self.averaged).items()}
        tensors |= {f"current.{name}": p for name, p in _trained_parameters(self.pipeline).items()}
        tensors |= self._muon.state() | self._adam.state()
        partial = path.with_suffix(".partial")
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, partial, metadata={"step": str(self.step)})
        partial.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Continue from what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            self.step = int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        for prefix, pipeline in (("average", self.averaged), ("current", self.pipeline)):
            for name, parameter in _trained_parameters(pipeline).items():
                parameter.copy_(tensors[f"{prefix}.{name}"])
        self._muon.load_state(tensors)
        self._adam.load_state(tensors)


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, constant, then a cosine to 2 % of the peak over the last part of the run."""
    late = max(0.0, (step / steps - DECAY_FROM) / (1 - DECAY_FROM))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late)))


def _flow_matching_loss(
    pipeline: StableDiffusion3Pipeline, latents: Tensor, token_ids: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity `eps - x_0` at drawn noise levels.

    Args:
        pipeline: Being trained.
        latents: [B, 4, 16, 16] clean latents x_0.
        token_ids: [B, L].
        generator: Source of sigma and noise.

    Returns:
        A scalar with gradient.
    """
    batch = len(latents)
    logit_normal = torch.sigmoid(1.1 * torch.randn(batch, generator=generator))
    uniform, choice = torch.rand(2, batch, generator=generator)
    sigma = torch.where(choice < UNIFORM_SIGMAS, uniform, logit_normal)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = latents.lerp(noise, sigma.view(-1, 1, 1, 1))
    hidden, pooled = encode_text(pipeline, token_ids)
    velocity = pipeline.transformer(noisy, hidden, pooled, sigma * 1000).sample
    return F.mse_loss(velocity, noise - latents)


class _Logbook:
    """A JSONL file that forgets what a resumed run is about to do again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, record: dict[str, Any]) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()})
        with self._path.open("a") as file:
            print(line, file=file)
        print(line, flush=True)

    def clear(self) -> None:
        """Start over."""
        self._path.unlink(missing_ok=True)

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Keep the records of steps up to `step`, and return them."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        records = [json.loads(line) for line in lines]
        kept = [r for r in records if r["phase"] == "autoencoder" or r["step"] <= step]
        self._path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        return kept


def _publish(pipeline: StableDiffusion3Pipeline, out_dir: Path) -> None:
    """Save into `out_dir` file by file, so that a concurrent reader never sees half a file."""
    fresh = out_dir / "state" / "fresh"
    save_pipeline(pipeline, fresh)
    for file in sorted(path for path in fresh.rglob("*") if path.is_file()):
        target = out_dir / file.relative_to(fresh)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.chmod(0o644)
        file.replace(target)
    shutil.rmtree(fresh)


def pretrain(
    out_dir: Path,
    *,
    seed: int = 0,
    steps: int = 9_000,
    autoencoder_steps: int = 2_400,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
    average_decay: float = 0.998,
    pool_size: int = 32_768,
    pool_steps: int = 4_000,
    eval_every: int = 1_000,
    images_per_category: int = 80,
    target: float = 0.55,
    compile_blocks: bool = True,
) -> Evaluation:
    """Train the embedded pipeline from nothing, or go on with a run that was interrupted.

    Every `eval_every` steps the averaged weights are judged on held-out prompts, without guidance. The
    snapshot whose strict score is nearest to `target` is kept in `out_dir` as a pipeline directory, and
    training stops when the score reaches `target`. `out_dir/pretrain_log.jsonl` records loss and scores;
    `out_dir/state` holds what is needed to resume, and goes when training is done.

    Args:
        out_dir: Where the pipeline directory is written; created if need be.
        seed: Everything random derives from it. On one machine, equal arguments give equal weights.
        steps: Updates at most; the learning rate's schedule ends here.
        autoencoder_steps: Updates of the autoencoder, which comes first.
        batch_size: Images per update.
        learning_rate: Peak, of Muon and AdamW alike.
        average_decay: Of the running average of the weights, which is what gets evaluated and saved.
        pool_size: Scenes drawn and encoded at once.
        pool_steps: Updates before a new pool is drawn.
        eval_every: Updates between evaluations, and between saved states.
        images_per_category: Images per evaluation, for each of six categories.
        target: Strict score in [0, 1] to stop at. 1 trains to the end.
        compile_blocks: Compile the transformer blocks; needs a C++ compiler, and half a minute.

    Returns:
        Scores of the saved float16 pipeline, after loading it back.

    Raises:
        ValueError: `steps` is not a multiple of `eval_every`, so the last steps would never be evaluated.
    """
    if steps < 1 or steps % eval_every:
        raise ValueError(
            f"pretrain(steps={steps}, eval_every={eval_every}): only evaluated weights are kept. "
            "Make steps a positive multiple of eval_every."
        )
    state = out_dir / "state"
    log = _Logbook(out_dir / "pretrain_log.jsonl")
    if not state.exists():
        state.mkdir(parents=True)
        log.clear()
    autoencoder = _own_autoencoder(state / "autoencoder", seed, autoencoder_steps, log)
    run = _Run(autoencoder, seed=seed, compile_blocks=compile_blocks)
    if (state / "run.safetensors").exists():
        run.load(state / "run.safetensors")
    scores = [r["strict"] for r in log.rewind(run.step) if r["phase"] == "evaluation"]

    empty = tokenise(run.pipeline.tokenizer, [""])

    @functools.lru_cache(maxsize=1)
    def pool(number: int) -> tuple[Tensor, Tensor]:
        latents, prompts = _draw_latents(pool_size, autoencoder, _generator(seed, "pool", number))
        return latents, tokenise(run.pipeline.tokenizer, [prompt.text for prompt in prompts])

    began, seen = time.perf_counter(), 0
    while run.step < steps and not (scores and scores[-1] >= target):
        latents, token_ids = pool(run.step // pool_steps)
        generator = _generator(seed, "step", run.step)
        rows = torch.randint(pool_size, (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, 1, generator=generator) < CAPTION_DROPOUT
        ids = torch.where(dropped, empty, token_ids[rows])
        loss = _flow_matching_loss(run.pipeline, latents[rows], ids, generator)
        rate = _learning_rate(run.step, steps, learning_rate)
        norm = run.update(loss, learning_rate=rate, average_decay=average_decay)
        seen += batch_size

        if run.step % 100 == 0:
            log(
                {
                    "phase": "flow",
                    "step": run.step,
                    "samples": run.step * batch_size,
                    "loss": loss.item(),
                    "gradient_norm": norm,
                    "learning_rate": rate,
                    "samples_per_second": seen / (time.perf_counter() - began),
                }
            )
        if run.step % eval_every == 0:
            scores.append(_judge(run, images_per_category, batch_size, log).strict)
            if abs(scores[-1] - target) <= min(abs(score - target) for score in scores):
                _publish(run.averaged, out_dir)
            run.save(state / "run.safetensors")

    shipped = evaluate(load_pipeline(out_dir), images_per_category=2 * images_per_category, seed=1)
    log({"phase": "shipped", "step": run.step, **attrs.asdict(shipped)})
    shutil.rmtree(state)
    return shipped


def _own_autoencoder(directory: Path, seed: int, steps: int, log: _Logbook) -> AutoencoderKL:
    """The autoencoder of this run: loaded if it is already trained, trained and saved if not."""
    from diffusers import AutoencoderKL

    if not directory.exists():
        trained = pretrain_autoencoder(seed=seed, steps=steps, log=log)
        trained.save_pretrained(directory.with_suffix(".partial"))
        directory.with_suffix(".partial").rename(directory)
    return AutoencoderKL.from_pretrained(directory).eval().requires_grad_(False)


def _judge(run: _Run, images_per_category: int, batch_size: int, log: _Logbook) -> Evaluation:
    """Evaluate the averaged weights and write it down."""
    start = time.perf_counter()
    scores = evaluate(run.averaged, images_per_category=images_per_category)
    log(
        {
            "phase": "evaluation",
            "step": run.step,
            "samples": run.step * batch_size,
            **attrs.asdict(scores),
            "seconds": time.perf_counter() - start,
        }
    )
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `pretrain`."""
    parser = argparse.ArgumentParser(prog="python -m rlt2i.tasks.shapes.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="pipeline directory to write")
    parser.add_argument("--steps", type=int, default=9_000, help="updates at most (default 9000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=0.55, help="strict score to stop at (default 0.55)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the transformer blocks")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    pretrain(
        options.out,
        seed=options.seed,
        steps=options.steps,
        target=options.target,
        compile_blocks=not options.no_compile,
    )


if __name__ == "__main__":
    main()
