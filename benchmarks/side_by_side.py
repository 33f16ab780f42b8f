"""One tiny SD3 workload through rlt2i and, in the same process, through the functions of flow_grpo and Flow-Factory.

    PEERS=/path/to/checkouts python -m benchmarks.side_by_side [--images 16] [--rounds 5]

PEERS holds checkouts called `flow_grpo` and `Flow-Factory`; one that is not there, or does not work here, is named
with the reason and left out. Ten steps, nine of them trained, guidance 4.5, an adapter of rank 8, float32, one thread.
The rollout includes decoding, the update is one optimiser step over all pairs. Arms take turns; a ratio is the median
over rounds of an arm's seconds / rlt2i's seconds in that round, so above 1 rlt2i is the faster one. Only ratios mean
something.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import attrs
import torch
from torch import Tensor

from rlt2i.algorithm import Algorithm
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.text_attention import TextAttention
from rlt2i.engine import Collected, Engine
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.learner import Learner
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.parameter_sets import ParameterSets
from rlt2i.policies.guidance import Guided
from rlt2i.policies.sd3 import SD3
from rlt2i.policies.tiny.pipelines import kl_autoencoder, stable_diffusion_3
from rlt2i.samplers.sde import SDE
from rlt2i.types import Prompts

STEPS, TRAINED, GUIDANCE, NOISE, CLIP, RANK = 10, 9, 4.5, 0.7, 1e-4, 8
PROMPT = "a red circle left of a blue square"


@attrs.frozen(kw_only=True)
class Arm:
    """One way of doing the workload.

    Attributes:
        name: in the table.
        rollout: rolls out and decodes; returns what `update` learns from.
        update: one optimiser step.
    """

    name: str
    rollout: Callable[[], Any]
    update: Callable[[Any], Any]


def save_pipeline(folder: Path, *, width: int, side: int) -> None:
    """An SD3 of four blocks with random weights."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    pipe = stable_diffusion_3()
    pipe.register_modules(
        transformer=SD3Transformer2DModel(
            sample_size=side, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
            num_attention_heads=width // 16, joint_attention_dim=48, caption_projection_dim=width,
            pooled_projection_dim=32, pos_embed_max_size=side, dual_attention_layers=(0, 1), qk_norm="rms_norm",
        ),
        vae=kl_autoencoder(
            scaling_factor=1.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False, widths=(8, 16)
        ),
    )  # fmt: skip
    pipe.save_pretrained(folder)


@attrs.frozen(kw_only=True)
class _Brightness(Reward):
    """The mean of an image."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        scores = batch.images.float().mean(dim=(1, 2, 3)) + torch.arange(len(batch.images))
        return RewardOutput.all_valid(scores)


# ---------------------------------------------------------------------------------------------------------------- arms


def ours(folder: Path, images: int, size: int, *, maps: bool = False, compiled: bool = False) -> Arm:
    """rlt2i, with its engine and its learner."""
    policy = SD3(path=str(folder), dtype="float32", lora_rank=RANK, max_sequence_length=32, compile=compiled).load()
    guided = Guided(policy=policy, scale=GUIDANCE) if not isinstance(policy, Guided) else policy
    allocations = (TextAttention(blocks="middle"),) if maps else ()
    algorithm = Algorithm(
        policy=guided,
        sampler=SDE(num_steps=STEPS),
        reward=_Brightness(),
        credit=Product(advantage=GroupRelative(), allocations=allocations),
        objective=ClippedSurrogate(clip_range=CLIP, ratio="location" if maps else "sample"),
    )
    engine = Engine(algorithm=algorithm, image_size=size, rollout_batch_size=images, seed=0)
    parameters = guided.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-6)
    optimizer.param_groups[0]["initial_lr"] = 1e-6
    learner = Learner(
        policy=guided, objective=algorithm.objective, reward=algorithm.reward, optimizer=optimizer,
        sets=ParameterSets(parameters), micro_batch_size=images,
    )  # fmt: skip
    prompts = attrs.evolve(Prompts.of([PROMPT], group_size=images), core=(("red circle",),))

    def rollout() -> Collected:
        return engine.collect(prompts, iteration=0)

    name = "rlt2i" + (", with maps" if maps else "") + (", compiled" if compiled else "")
    return Arm(name=name, rollout=rollout, update=lambda collected: learner.learn(collected.experience))


def _stock(folder: Path, images: int) -> tuple[Any, list[torch.nn.Parameter], dict[str, Tensor]]:
    """The stock pipeline with PEFT's adapter, its parameters, and the embeddings of the prompts."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig

    from rlt2i.policies.lora import FLOW_GRPO_TARGETS

    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(pipe, name).requires_grad_(False)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, init_lora_weights="gaussian", target_modules=list(FLOW_GRPO_TARGETS)
    )
    pipe.transformer.add_adapter(config)
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT, None, None, max_sequence_length=32)
    rows = lambda tensor: tensor.repeat(images, *[1] * (tensor.ndim - 1))
    return pipe, parameters, {
        "prompt_embeds": rows(embeds), "negative_prompt_embeds": rows(negative),
        "pooled_prompt_embeds": rows(pooled), "negative_pooled_prompt_embeds": rows(negative_pooled),
    }  # fmt: skip


def _step(loss_of: Callable[[int], Tensor], parameters: list[torch.nn.Parameter], optimizer: Any) -> None:
    """A backward pass per trained step, as both peers do, then the clipped optimiser step."""
    optimizer.zero_grad()
    for step in range(TRAINED):
        (loss_of(step) / TRAINED).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _surrogate(log_prob: Tensor, old: Tensor) -> Tensor:
    advantage = torch.linspace(-1, 1, len(old))
    ratio = torch.exp(log_prob - old)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()


def flow_grpo(peers: Path, folder: Path, images: int, size: int) -> Arm:
    """Its `pipeline_with_logprob` and the `compute_log_prob` of its training script."""
    sys.path.insert(0, str(peers / "flow_grpo"))
    rolled = _imported("flow_grpo.diffusers_patch.sd3_pipeline_with_logprob").pipeline_with_logprob
    compute_log_prob = _imported("scripts.train_sd3").compute_log_prob
    pipe, parameters, texts = _stock(folder, images)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    config = types.SimpleNamespace(
        train=types.SimpleNamespace(cfg=True),
        sample=types.SimpleNamespace(guidance_scale=GUIDANCE, noise_level=NOISE),
    )
    embeds = torch.cat([texts["negative_prompt_embeds"], texts["prompt_embeds"]])
    pooled = torch.cat([texts["negative_pooled_prompt_embeds"], texts["pooled_prompt_embeds"]])

    def rollout() -> dict[str, Tensor]:
        _, latents, log_probs = rolled(
            pipe, **texts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt", height=size,
            width=size, noise_level=NOISE,
        )  # fmt: skip
        states = torch.stack(latents, dim=1)
        return {
            "latents": states[:, :-1], "next_latents": states[:, 1:], "log_probs": torch.stack(log_probs, dim=1),
            "timesteps": pipe.scheduler.timesteps.repeat(images, 1),
        }  # fmt: skip

    def update(sample: dict[str, Tensor]) -> None:
        def loss(step: int) -> Tensor:
            log_prob = compute_log_prob(pipe.transformer, pipe, sample, step, embeds, pooled, config)[1]
            return _surrogate(log_prob, sample["log_probs"][:, step])

        _step(loss, parameters, optimizer)

    return Arm(name="flow_grpo", rollout=rollout, update=update)


def flow_factory(peers: Path, folder: Path, images: int, size: int) -> Arm:
    """Its SD3.5 adapter's `inference` and `forward`, with its SDE scheduler; only the adapter's set-up is ours."""
    sys.path.insert(0, str(peers / "Flow-Factory" / "src"))
    adapter_class = _imported("flow_factory.models.stable_diffusion.sd3_5").SD3_5Adapter
    scheduler_class = _imported("flow_factory.scheduler").FlowMatchEulerDiscreteSDEScheduler
    pipe, parameters, texts = _stock(folder, images)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    class Adapter(adapter_class):  # type: ignore[misc, valid-type]
        device = torch.device("cpu")
        transformer = pipe.transformer
        pipeline = pipe
        scheduler = scheduler_class(noise_level=NOISE, dynamics_type="Flow-SDE", shift=pipe.scheduler.config.shift)

        def __init__(self) -> None:
            """What it reads of files is given above."""

        def cast_latents(self, latents: Tensor, default_dtype: Any = None) -> Tensor:
            return latents.float()

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    adapter = Adapter()

    def rollout() -> list[Any]:
        return adapter.inference(
            [PROMPT] * images, height=size, width=size, num_inference_steps=STEPS, guidance_scale=GUIDANCE, **texts
        )

    def update(samples: list[Any]) -> None:
        states = torch.stack([sample.all_latents for sample in samples])
        old = torch.stack([sample.log_probs for sample in samples])
        times = samples[0].timesteps

        def loss(step: int) -> Tensor:
            output = adapter.forward(
                t=times[step], t_next=times[step + 1], latents=states[:, step], next_latents=states[:, step + 1],
                guidance_scale=GUIDANCE, noise_level=NOISE, **texts,
            )  # fmt: skip
            return _surrogate(output.log_prob, old[:, step])

        _step(loss, parameters, optimizer)

    return Arm(name="Flow-Factory", rollout=rollout, update=update)


def _imported(name: str, stubs: int = 30) -> Any:
    """A peer's module; packages that it imports and that are not here are stood in for, since no arm calls them."""
    for _ in range(stubs):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == name.split(".")[0]:
                raise
            sys.modules[error.name] = MagicMock(__path__=[], __spec__=None, __version__="0")
    raise ImportError(f"{name}: more than {stubs} packages are missing")


# --------------------------------------------------------------------------------------------------------------- timing


def measure(arms: Sequence[Arm], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of rollout and update, by arm and round, after a round that warms up."""
    seconds: dict[str, list[tuple[float, float]]] = {arm.name: [] for arm in arms}
    for number in range(rounds + 1):
        for arm in arms:
            start = time.perf_counter()
            data = arm.rollout()
            middle = time.perf_counter()
            arm.update(data)
            if number:
                seconds[arm.name].append((middle - start, time.perf_counter() - middle))
    return seconds


def ratios(seconds: dict[str, list[tuple[float, float]]], name: str, base: str) -> tuple[float, float, float]:
    """Of an arm to the base: rollout, update and both, medians over rounds."""
    pairs = list(zip(seconds[name], seconds[base], strict=True))
    return (
        statistics.median(a[0] / b[0] for a, b in pairs),
        statistics.median(a[1] / b[1] for a, b in pairs),
        statistics.median(sum(a) / sum(b) for a, b in pairs),
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """Command line; returns the ratios to rlt2i that it prints."""
    parser = argparse.ArgumentParser(description="rlt2i beside its peers on the CPU")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="pixels a side; latents are half of it")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    peers = os.environ.get("PEERS")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_pipeline(path, width=options.width, side=options.size // 2)
        base = ours(path, options.images, options.size)
        arms = [base, ours(path, options.images, options.size, maps=True)]
        if options.compile:
            arms.append(ours(path, options.images, options.size, compiled=True))
        for name, make in (("flow_grpo", flow_grpo), ("Flow-Factory", flow_factory)):
            if peers is None or not (Path(peers) / name).is_dir():
                print(f"{name}: not timed, PEERS={peers} holds no checkout of that name")
                continue
            try:
                arm = make(Path(peers), path, options.images, options.size)
                arm.update(arm.rollout())  # what does not work is found before anything is timed
            except Exception as error:
                print(f"{name}: not timed, {type(error).__name__}: {error}")
                continue
            arms.append(arm)
        seconds = measure(arms, options.rounds)
    print(f"{options.images} images, {STEPS} steps, {TRAINED} trained, width {options.width}, {options.rounds} rounds")
    found = {arm.name: ratios(seconds, arm.name, base.name) for arm in arms}
    for name, (rolled, updated, both) in found.items():
        print(f"{name:<20} rollout x {rolled:.2f}   update x {updated:.2f}   both x {both:.2f} of rlt2i's time")
    return found


if __name__ == "__main__":
    main()
