"""What one GPU does with SD3.5-M at its real size and random weights, in one script of under eight minutes.

    python -m benchmarks.gpu [--out gpu.md] [--batches 9,18,36] [--budget 460]
    python -m benchmarks.gpu --tiny            # the same sections on a toy network, on any machine

Ceilings (matrix products, copies), attention kernels, rollout and update, eager and with compiled blocks, at several
batch sizes, the cost of recording attention, peak memory, the ratio at the first update, and compiled graphs. No
download: configurations are part of the package. A section that fails, does not fit into memory or into the time says
so in its row; nothing is left out without a word. Compilation is not part of the times, and has rows of its own.
"""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.algorithm import Algorithm
from rlt2i.captures import attention_name
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.engine import Collected, Engine
from rlt2i.functional.schedules import sd3_sigmas
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.learner import Learner
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.parameter_sets import ParameterSets
from rlt2i.policies.attention.kernels import Kernel, attend
from rlt2i.policies.guidance import Guided
from rlt2i.policies.pretrained.loading import compile_blocks
from rlt2i.policies.sd3 import SD3, SD3Policy
from rlt2i.samplers.sde import SDE
from rlt2i.types import ImageSize, Prompts

TOKENS = 20
"""Tokens of the prompt that a map is made of."""
WORDS = tuple(f"word{number}" for number in range(TOKENS))


@attrs.frozen(kw_only=True)
class Scale:
    """How large everything is.

    Attributes:
        network, vae: fields of the configurations that differ from those of SD3.5-M.
        image_size, text_tokens: pixels a side; CLIP and T5 tokens together.
        steps: denoising steps, all but the last of which are trained.
        matrix: side of the matrix products.
        heads, tokens, head_dim: of the attention that is timed.
        dtype: of the network.
    """

    network: Mapping[str, Any] = attrs.field(factory=dict)
    vae: Mapping[str, Any] = attrs.field(factory=dict)
    image_size: int = 512
    text_tokens: int = 205
    steps: int = 10
    matrix: int = 8192
    heads: int = 24
    tokens: int = 1229
    head_dim: int = 64
    dtype: str = "bfloat16"


TINY = Scale(
    network={
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 16,
        "caption_projection_dim": 16, "pooled_projection_dim": 16, "dual_attention_layers": [0],
        "pos_embed_max_size": 16,
    },
    vae={"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1,
         "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
    image_size=16, text_tokens=21, steps=2, matrix=64, heads=2, tokens=24, head_dim=8, dtype="float32",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- policy


@attrs.frozen(kw_only=True)
class _Scaled(SD3):
    """SD3.5-M's configuration with some fields changed."""

    scale: Scale = attrs.field(factory=Scale)

    def config(self, component: str) -> Any:
        changed = {"transformer": self.scale.network, "vae": self.scale.vae}.get(component, {})
        return {**super().config(component), **changed}


class _RandomText:
    """In place of text encoders: one embedding a prompt, drawn from its characters."""

    def __init__(self, spec: _Scaled, device: torch.device) -> None:
        width = spec.config("transformer")
        self._shapes = {
            "embeddings": (spec.scale.text_tokens, width["joint_attention_dim"]),
            "pooled": (width["pooled_projection_dim"],),
        }
        self._device, self._dtype = device, spec.compute_dtype

    def encode(self, text: str, encode: Any, *, negative: bool = False) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(len(text) + negative)
        return {
            name: torch.randn(shape, generator=draw).to(self._device, self._dtype)
            for name, shape in self._shapes.items()
        }


class _Policy(SD3Policy):
    """SD3's policy, whose prompts are `WORDS`, a token each, with the published schedule."""

    def sigmas(self, num_steps: int, size: ImageSize) -> Tensor:
        return sd3_sigmas(num_steps, shift=3.0)

    def text_streams(self, text: str) -> Mapping[str, tuple[int, Sequence[tuple[int, int]]]]:
        ranges, start = [], 0
        for word in text.split():
            ranges.append((start, start + len(word)))
            start += len(word) + 1
        return {"clip": (0, ranges)}


def random_policy(scale: Scale, device: torch.device, *, compiled: bool) -> Guided:
    """SD3.5-M (or a smaller one) with weights drawn at random, an adapter of rank 32 and guidance of 4.5."""
    spec = _Scaled(
        path="stabilityai/stable-diffusion-3.5-medium", dtype=scale.dtype, lora_rank=32, max_sequence_length=128,
        scale=scale,
    )  # fmt: skip
    meta = _Policy.on_meta(spec)
    for module in (meta.network, meta.vae):
        module.to_empty(device=device)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                torch.nn.init.normal_(tensor.data, std=0.02)
    if device.type == "cuda" and spec.image_dtype == torch.bfloat16:
        meta.vae.to(memory_format=torch.channels_last)
    policy = _Policy(spec=spec, pipe=meta.pipe, text=_RandomText(spec, device), device=device)  # type: ignore[arg-type]
    from rlt2i.policies.attention.watch import watch

    watch(policy.attentions(), device, spec.compute_dtype)
    if compiled:
        compile_blocks(policy.blocks())
    return Guided(policy=policy, scale=4.5)


@attrs.frozen(kw_only=True)
class _Brightness(Reward):
    """The mean of an image: differs between rollouts, costs nothing."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        scores = batch.images.float().mean(dim=(1, 2, 3)) + torch.arange(len(batch.images), device=batch.images.device)
        return RewardOutput.all_valid(scores)


# --------------------------------------------------------------------------------------------------------------- table


@attrs.define
class Table:
    """Rows of (what, number with its unit), and the time that is left.

    Attributes:
        budget: seconds for everything.
        rows: what was found.
    """

    budget: float
    rows: list[tuple[str, str]] = attrs.field(factory=list)
    began: float = attrs.field(factory=time.perf_counter)

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.began

    def section(self, name: str, work: Callable[[], Iterator[tuple[str, str]]]) -> None:
        """Rows of a section, or why there are none."""
        if self.spent > self.budget:
            self._add(name, f"not run: {self.spent:.0f} of {self.budget:.0f} s were spent")
            return
        try:
            for row in work():
                self._add(*row)
        except Exception as error:
            self._add(
                name, f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _add(self, name: str, value: str) -> None:
        self.rows.append((name, value))
        print(f"{self.spent:6.1f} s  {name:<58} {value}", flush=True)

    def markdown(self, title: str) -> str:
        """A page."""
        lines = [f"# {title}", "", "| what | measured |", "|---|---|"]
        return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in self.rows)]) + "\n"


def seconds_of(work: Callable[[], Any], device: torch.device, *, repeats: int) -> float:
    """The best of some repeats, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------------ sections


def ceilings(scale: Scale, device: torch.device) -> Iterator[tuple[str, str]]:
    """What the device can do at most."""
    dtype, side = getattr(torch, scale.dtype), scale.matrix
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = seconds_of(lambda: left @ right, device, repeats=10)
    yield f"matrix product, {side} x {side}, {scale.dtype}", f"{2 * side**3 / seconds / 1e12:.1f} TFLOP/s"
    block = torch.empty(side * side, device=device, dtype=dtype)
    seconds = seconds_of(lambda: block.copy_(left.flatten()), device, repeats=10)
    yield "copy on the device, read and written", f"{2 * block.nbytes / seconds / 1e9:.0f} GB/s"


def attention(scale: Scale, device: torch.device, batch: int) -> Iterator[tuple[str, str]]:
    """Every kernel forward, and forward with backward."""
    dtype, shape = getattr(torch, scale.dtype), (batch, scale.heads, scale.tokens, scale.head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    flops = 4 * batch * scale.heads * scale.tokens**2 * scale.head_dim
    kernels: tuple[Kernel, ...] = ("cudnn", "flash", "efficient") if device.type == "cuda" else ("cpu",)

    def forward(kernel: Kernel) -> None:
        with torch.no_grad():
            attend(query, key, value, kernel)

    for kernel in kernels:
        name = f"attention {kernel}, {list(shape)}"
        try:
            once = seconds_of(lambda kernel=kernel: forward(kernel), device, repeats=5)
            both = seconds_of(
                lambda kernel=kernel: attend(query, key, value, kernel)[0].sum().backward(), device, repeats=5
            )
        except RuntimeError as error:
            yield name, f"failed: {str(error).splitlines()[0]}"
            continue
        yield (
            name,
            f"{1e3 * once:.3f} ms forward ({flops / once / 1e12:.0f} TFLOP/s), {1e3 * both:.3f} ms with backward",
        )


def _engine(policy: Guided, scale: Scale, device: torch.device, batch: int) -> Engine:
    algorithm = Algorithm(
        policy=policy,
        sampler=SDE(num_steps=scale.steps),
        reward=_Brightness(),
        credit=Product(advantage=GroupRelative()),
        objective=ClippedSurrogate(),
    )
    return Engine(
        algorithm=algorithm, image_size=scale.image_size, rollout_batch_size=batch, seed=0, device=device
    )  # fmt: skip


def _prompts(batch: int) -> Prompts:
    text = " ".join(WORDS)
    return attrs.evolve(Prompts.of([text], group_size=batch), core=((" ".join(WORDS[:2]),),))


def rollout_and_update(
    scale: Scale, device: torch.device, batches: Sequence[int], *, compiled: bool
) -> Iterator[tuple[str, str]]:
    """Images per second, milliseconds per trained (image, step), memory, and the ratio at the first update."""
    how = "compiled" if compiled else "eager"
    policy = random_policy(scale, device, compiled=compiled)
    learner = Learner(
        policy=policy, objective=ClippedSurrogate(), reward=_Brightness(), micro_batch_size=1,
        optimizer=torch.optim.AdamW(policy.trainable_parameters().values(), lr=0.0),
        sets=ParameterSets(policy.trainable_parameters()),
    )  # fmt: skip
    for group in learner.optimizer.param_groups:
        group["initial_lr"] = 0.0
    for batch in batches:
        engine, collected = _engine(policy, scale, device, batch), None
        try:
            _forget_peak(device)
            began = time.perf_counter()
            collected = engine.collect(_prompts(batch), iteration=0)
            _wait(device)
            first = time.perf_counter() - began
            collect = functools.partial(engine.collect, _prompts(batch), iteration=0)
            seconds = seconds_of(collect, device, repeats=1)
            yield f"rollout, {how}, {batch} images", f"{batch / seconds:.2f} images/s, peak {_peak(device)}"
            if compiled:
                yield f"rollout, first call, {batch} images", f"{first - seconds:.1f} s of compilation"
            yield from _update(learner, collected, scale, device, batch, how)
        except torch.OutOfMemoryError:
            yield f"{how}, {batch} images", "does not fit into memory"
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if compiled:
        from torch._dynamo.utils import counters

        yield "compiled graphs in all", f"{counters['stats']['unique_graphs']}"


def _update(
    learner: Learner, collected: Collected, scale: Scale, device: torch.device, batch: int, how: str
) -> Iterator[tuple[str, str]]:
    learner.micro_batch_size = batch
    _forget_peak(device)
    metrics = learner.learn(collected.experience)
    seconds = seconds_of(lambda: learner.learn(collected.experience), device, repeats=1)
    each = 1e3 * seconds / (batch * (scale.steps - 1))
    name = f"update, {how}, micro-batch {batch}"
    yield name, f"{each:.2f} ms per image and step, peak {_peak(device)}"
    yield f"{name}, |ratio - 1| at most", f"{metrics['ratio/abs_minus_one_max']:.1e}"


def star(scale: Scale, device: torch.device, batch: int) -> Iterator[tuple[str, str]]:
    """A rollout with and without recorded attention, in turns."""
    policy = random_policy(scale, device, compiled=False)
    engine = _engine(policy, scale, device, batch)
    from rlt2i.samplers.chunked import rollout

    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(3):
        for name, captures in (
            ("without", frozenset[str]()),
            ("with", frozenset({attention_name("image_to_text", "middle")})),
        ):
            work = lambda captures=captures: rollout(
                policy, engine.algorithm.sampler, _prompts(batch), seed=0, image_size=scale.image_size,
                rollout_batch_size=batch, captures=captures, device=device,
            )  # fmt: skip
            seconds[name].append(seconds_of(work, device, repeats=1))
    share = min(seconds["with"]) / min(seconds["without"]) - 1
    yield f"recording attention, {TOKENS} tokens, middle blocks, {batch} images", f"{100 * share:+.2f} % of a rollout"


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> str:
    return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else "unmeasured"


def machine(device: torch.device) -> Iterator[tuple[str, str]]:
    """What it ran on."""
    import diffusers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    yield "device", name
    yield "torch, CUDA, cuDNN", f"{torch.__version__}, {torch.version.cuda}, {torch.backends.cudnn.version()}"
    yield "diffusers", diffusers.__version__


def main(arguments: Sequence[str] | None = None) -> Table:
    """Command line; returns the table that it writes."""
    parser = argparse.ArgumentParser(description="what one GPU does with SD3.5-M")
    parser.add_argument("--out", type=Path, default=None, help="a Markdown file")
    parser.add_argument("--batches", default="9,18,36", help="images per forward pass")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds after which no section is begun")
    parser.add_argument("--tiny", action="store_true", help="a toy network: shows that the script works, no number")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no GPU here. --tiny runs the same sections on a toy network.")
    scale = TINY if options.tiny else Scale()
    batches = [int(batch) for batch in options.batches.split(",")]
    table = Table(budget=options.budget)
    middle = batches[len(batches) // 2]
    table.section("machine", lambda: machine(device))
    table.section("ceilings", lambda: ceilings(scale, device))
    table.section("attention kernels", lambda: attention(scale, device, 2 * batches[0]))
    table.section("eager", lambda: rollout_and_update(scale, device, batches, compiled=False))
    table.section("recording attention", lambda: star(scale, device, middle))
    table.section("compiled", lambda: rollout_and_update(scale, device, batches, compiled=True))
    if options.out is not None:
        title = "A toy network: no measurement" if options.tiny else "SD3.5-M with random weights on one GPU"
        options.out.write_text(table.markdown(title), encoding="utf-8")
    return table


if __name__ == "__main__":
    main()
