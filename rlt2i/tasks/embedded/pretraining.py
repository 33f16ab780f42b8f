"""The training run of an embedded pipeline: what every world does alike.

Every random draw is a function of (seed, purpose, step), so a run that was killed continues as if nothing had
happened. Files are safetensors and JSON; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from rlt2i.tasks.embedded.networks import (
    LATENT_CHANNELS,
    World,
    build_pipeline,
    decode_latents,
    encode_text,
    latent_side,
    load_pipeline,
    save_pipeline,
    tokenise,
)
from rlt2i.tasks.embedded.optimisers import Adam, Muon

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline

UNIFORM_SIGMAS: Final = 0.20
"""Share of noise levels drawn uniformly; the rest are logit-normal(0, 1.1)."""

WARMUP_STEPS: Final = 100
DECAY_FROM: Final = 0.6
"""Share of the steps after which the learning rate falls as a cosine."""


@attrs.frozen(kw_only=True)
class Scores:
    """What every world's judge says; each world adds its own.

    Attributes:
        strict: Share of right images.
        partial: Mean partial score.
    """

    strict: float
    partial: float


S = TypeVar("S", bound=Scores)


@attrs.frozen(kw_only=True)
class Schedule:
    """How long and how fast a run learns.

    Attributes:
        steps: Updates at most; the learning rate's schedule ends here.
        batch_size: Images per update.
        learning_rate: Peak, of Muon and AdamW alike.
        average_decay: Of the running average of the weights, which is what gets evaluated and saved.
        eval_every: Updates between evaluations, and between saved states.
        target: Strict score in [0, 1] to stop at. 1 trains to the end.
    """

    steps: int = attrs.field()
    batch_size: int = 64
    learning_rate: float
    average_decay: float = 0.998
    eval_every: int
    target: float

    @steps.validator
    def _check_steps(self, _: Any, value: int) -> None:
        if value < 1 or value % self.eval_every:
            raise ValueError(
                f"pretrain(steps={value}, eval_every={self.eval_every}): only evaluated weights are kept. "
                "Make steps a positive multiple of eval_every."
            )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, constant, then a cosine to 2 % of the peak over the last part of the run."""
        late = max(0.0, (step / self.steps - DECAY_FROM) / (1 - DECAY_FROM))
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late))
        return self.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * fall


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator that is a function of (seed, purpose) alone."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def sample_texts(
    pipeline: StableDiffusion3Pipeline,
    texts: Sequence[str],
    *,
    canvas: int,
    num_steps: int = 10,
    generator: torch.Generator,
    batch_size: int = 96,
) -> Tensor:
    """Sample with the Euler rule on an even sigma grid, without guidance.

    Args:
        pipeline: A float32 pipeline.
        texts: B prompts.
        canvas: Side of the images, in pixels.
        num_steps: Euler steps; sigma goes 1, 1 - 1/n, ..., 0.
        generator: Source of the initial noise.
        batch_size: Images per forward pass; the result does not depend on it.

    Returns:
        [B, 3, canvas, canvas] float32 images in [0, 1].
    """
    side = latent_side(canvas)
    noise = torch.randn(len(texts), LATENT_CHANNELS, side, side, generator=generator)
    token_ids = tokenise(pipeline.tokenizer, list(texts))
    images = []
    for latents, ids in zip(noise.split(batch_size), token_ids.split(batch_size), strict=True):
        hidden, pooled = encode_text(pipeline, ids)
        for step in range(num_steps):
            timestep = torch.full((len(ids),), 1000 * (1 - step / num_steps))
            velocity = pipeline.transformer(latents, hidden, pooled, timestep).sample
            latents = latents - velocity / num_steps
        images.append(decode_latents(pipeline.vae, latents))
    return torch.cat(images)


def trained_parameters(pipeline: StableDiffusion3Pipeline) -> dict[str, Tensor]:
    """Name -> parameter of everything but the autoencoder."""
    parts = ("transformer", "text_encoder", "text_encoder_2")
    return {f"{part}.{name}": p for part in parts for name, p in getattr(pipeline, part).named_parameters()}


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it: a matrix of a transformer block, but not the modulation, whose rows are scales."""
    return parameter.ndim == 2 and "transformer_blocks" in name and "norm1" not in name


class Run:
    """Everything that changes from step to step: networks, their running average, and both optimisers."""

    def __init__(self, autoencoder: AutoencoderKL, world: World, *, seed: int, compile_blocks: bool) -> None:
        self.step, self.seed = 0, seed
        self.pipeline = build_pipeline(autoencoder, world, generator_for(seed, "weights"))
        self.averaged = build_pipeline(autoencoder, world, generator_for(seed, "weights"))
        for network in (self.averaged.transformer, self.averaged.text_encoder, self.averaged.text_encoder_2):
            network.eval().requires_grad_(False)
        named = trained_parameters(self.pipeline)
        self.parameters = list(named.values())
        self._averages = list(trained_parameters(self.averaged).values())
        self._muon = Muon(p for name, p in named.items() if _is_block_matrix(name, p))
        self._adam = Adam(p for name, p in named.items() if not _is_block_matrix(name, p))
        if compile_blocks:
            for block in self.pipeline.transformer.transformer_blocks:
                block.compile(fullgraph=True, dynamic=False)

    def update(self, loss: Tensor, *, learning_rate: float, average_decay: float) -> float:
        """Take one optimizer step and return the gradient's norm before clipping at 1."""
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

        tensors = {f"average.{name}": p for name, p in trained_parameters(self.averaged).items()}
        tensors |= {f"current.{name}": p for name, p in trained_parameters(self.pipeline).items()}
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
            for name, parameter in trained_parameters(pipeline).items():
                parameter.copy_(tensors[f"{prefix}.{name}"])
        self._muon.load_state(tensors)
        self._adam.load_state(tensors)


def flow_matching_loss(
    pipeline: StableDiffusion3Pipeline, latents: Tensor, token_ids: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity `eps - x_0` at drawn noise levels.

    Args:
        pipeline: Being trained.
        latents: [B, 4, h, w] clean latents x_0.
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


class Logbook:
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


def publish(pipeline: StableDiffusion3Pipeline, out_dir: Path) -> None:
    """Save into `out_dir` file by file, so that a concurrent reader never sees half a file."""
    fresh = out_dir / "state" / "fresh"
    save_pipeline(pipeline, fresh)
    for file in sorted(path for path in fresh.rglob("*") if path.is_file()):
        target = out_dir / file.relative_to(fresh)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.chmod(0o644)
        file.replace(target)
    shutil.rmtree(fresh)


def open_log(out_dir: Path) -> Logbook:
    """The log of a run in `out_dir`: that of the run that was interrupted there, or a fresh one."""
    log = Logbook(out_dir / "pretrain_log.jsonl")
    if not (out_dir / "state").exists():
        (out_dir / "state").mkdir(parents=True)
        log.clear()
    return log


def fit(
    run: Run,
    schedule: Schedule,
    *,
    out_dir: Path,
    log: Logbook,
    draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]],
    judge: Callable[[StableDiffusion3Pipeline], S],
    judge_shipped: Callable[[StableDiffusion3Pipeline], S],
) -> S:
    """Train, or go on with a run that was interrupted, and leave the best pipeline in `out_dir`.

    The averaged weights are judged every `eval_every` steps. The snapshot whose strict score is nearest to the target
    is kept. `out_dir/state` holds what is needed to resume, and goes when training is done.

    Args:
        run: At step 0; its state is read from `out_dir/state` if there is one.
        schedule: How long and how fast.
        out_dir: Where the pipeline directory is written.
        log: From `open_log`.
        draw: (generator of the step, step) -> [B, 4, h, w] clean latents and [B, L] token ids.
        judge: Scores the averaged weights.
        judge_shipped: Scores the saved float16 pipeline after loading it back.

    Returns:
        The scores of the saved pipeline.
    """
    state = out_dir / "state" / "run.safetensors"
    if state.exists():
        run.load(state)
    scores = [r["strict"] for r in log.rewind(run.step) if r["phase"] == "evaluation"]
    began, observed = time.perf_counter(), 0
    while run.step < schedule.steps and not (scores and scores[-1] >= schedule.target):
        generator = generator_for(run.seed, "step", run.step)
        latents, token_ids = draw(generator, run.step)
        loss = flow_matching_loss(run.pipeline, latents, token_ids, generator)
        rate = schedule.learning_rate_at(run.step)
        norm = run.update(loss, learning_rate=rate, average_decay=schedule.average_decay)
        observed += len(latents)
        samples = {"step": run.step, "samples": run.step * schedule.batch_size}
        if run.step % 100 == 0:
            log(
                {
                    "phase": "flow",
                    **samples,
                    "loss": loss.item(),
                    "gradient_norm": norm,
                    "learning_rate": rate,
                    "samples_per_second": observed / (time.perf_counter() - began),
                }
            )
        if run.step % schedule.eval_every == 0:
            start = time.perf_counter()
            judged = judge(run.averaged)
            log({"phase": "evaluation", **samples, **attrs.asdict(judged), "seconds": time.perf_counter() - start})
            scores.append(judged.strict)
            target = schedule.target
            if abs(scores[-1] - target) <= min(abs(score - target) for score in scores):
                publish(run.averaged, out_dir)
            run.save(state)

    shipped = judge_shipped(load_pipeline(out_dir))
    log({"phase": "shipped", "step": run.step, **attrs.asdict(shipped)})
    shutil.rmtree(out_dir / "state")
    return shipped
