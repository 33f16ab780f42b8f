"""How long, how fast and how often: the settings of a run that belong to no part, and its batch arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import attrs
from attrs.validators import ge, gt, in_, le, lt, optional

from rlt2i.config import neutral
from rlt2i.distributed import TIMEOUT
from rlt2i.tasks.curriculum import PromptCurriculum
from rlt2i.types import ImageSize, at_least_a_pixel, image_size, image_sizes

Tracker = Literal["tensorboard", "wandb", "trackio"]
Sharding = Literal["none", "full", "hybrid"]


@attrs.frozen(kw_only=True)
class TrainConfig:
    """The invariants of a run. World size, micro-batches and accumulation follow from them (`derive_batch`).

    Attributes:
        seed: from which every draw of the run follows.
        iterations: rollout batches to collect and learn from.
        prompts_per_iteration: P, over all processes together.
        group_size: G, rollouts per prompt.
        optimizer_steps_per_iteration: optimiser steps per rollout batch, each on its own share of the groups.
        rollout_batch_size: rollouts per forward pass while sampling. It is meant for speed and memory: the draws are
            the same whatever it is. But kernels may round otherwise for batches of another size, and sampling carries
            that on: the same image to the last bits in float32; in bfloat16 another one of the same quality (latents
            differ by about .1 after four stochastic steps).
        micro_batch_size: (rollout, step) pairs per forward pass while learning. Likewise: the gradient is the same up
            to the order of its sums and the rounding of the dtype.
        image_size: in pixels, one number for a square or [height, width]; of evaluations, and of rollouts too.
        sizes: of rollouts where they are to be of several: each gets equally many groups of an iteration, and which
            ones is drawn by the seed. A size that is named twice gets twice as many. Batches are of one size, and
            statistics over a whole batch are over the groups of a size.
        share_initial_noise: start the rollouts of a group from the same noise.
        learning_rate, betas, weight_decay, adam_eps: of AdamW.
        max_grad_norm: global norm at which gradients are clipped.
        warmup_steps: optimiser steps of linear warm-up.
        ema_decay: of the averaged weights that are evaluated and exported as well, or null for none.
        reference: keep the starting weights at hand and log the distance from them, even where no loss asks for it.
        eval_every: iterations between evaluations; 0 for only before the first and after the last.
        eval_prompts: held-out prompts per evaluation, one image each.
        eval_steps: denoising steps of the ODE that draws them.
        eval_seed: of their initial noise, the same at every evaluation.
        checkpoint_every: iterations between checkpoints; the last always leaves one.
        keep_checkpoints: how many of the newest are kept.
        max_invalid_share: of rollouts whose reward failed; beyond it the run stops instead of learning from the rest.
        trackers: where metrics go besides metrics.jsonl.
        process_timeout: seconds that a process waits for the others before the run ends; one that died ends it at once.
        merge_adapter: evaluate with the adapter merged into the weights, and roll out so where the objective takes no
            ratio between rollout and update: fewer products, and other last digits.
        curriculum: which prompts of the stream are passed over; null takes it as it comes.
        sharding: of a network that learns as a whole. "full": each process holds a part of weights, gradients,
            optimiser state and parameter sets (FSDP2); "hybrid": parts within a machine, equal copies across machines;
            "none": every process holds all. Same mathematics, sums in another order.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {
        "updates": "iterations",
        "prompts_per_update": "prompts_per_iteration",
        "updates_per_rollout": "optimizer_steps_per_iteration",
        "warmup_updates": "warmup_steps",
        "images_per_device": "rollout_batch_size",
        "sequences_per_device": "micro_batch_size",
    }

    seed: int = attrs.field(default=0, validator=ge(0))
    iterations: int = attrs.field(validator=ge(1))
    prompts_per_iteration: int = attrs.field(validator=ge(1))
    group_size: int = attrs.field(validator=ge(1))
    optimizer_steps_per_iteration: int = attrs.field(default=1, validator=ge(1))
    rollout_batch_size: int = attrs.field(validator=ge(1))
    micro_batch_size: int = attrs.field(validator=ge(1))
    image_size: ImageSize = attrs.field(converter=image_size, validator=at_least_a_pixel)
    sizes: tuple[ImageSize, ...] = neutral((), converter=image_sizes, validator=at_least_a_pixel)
    share_initial_noise: bool = False
    learning_rate: float = attrs.field(validator=gt(0))
    betas: tuple[float, float] = attrs.field(default=(0.9, 0.999))
    weight_decay: float = attrs.field(default=1e-4, validator=ge(0))
    adam_eps: float = attrs.field(default=1e-8, validator=gt(0))
    max_grad_norm: float = attrs.field(default=1.0, validator=gt(0))
    warmup_steps: int = attrs.field(default=0, validator=ge(0))
    ema_decay: float | None = attrs.field(default=None, validator=optional([ge(0), lt(1)]))
    reference: bool = False
    eval_every: int = attrs.field(default=0, validator=ge(0))
    eval_prompts: int = attrs.field(default=0, validator=ge(0))
    eval_steps: int = attrs.field(default=10, validator=ge(1))
    eval_seed: int = attrs.field(default=0, validator=ge(0))
    checkpoint_every: int = attrs.field(default=10, validator=ge(1))
    keep_checkpoints: int = attrs.field(default=2, validator=ge(1))
    max_invalid_share: float = attrs.field(default=0.25, validator=[ge(0), le(1)])
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    process_timeout: float = neutral(TIMEOUT, validator=gt(0))
    merge_adapter: bool = neutral(False)
    curriculum: PromptCurriculum | None = neutral(None)
    sharding: Sharding = neutral("none", validator=in_(get_args(Sharding)))

    @betas.validator
    def _check_betas(self, _: Any, value: tuple[float, float]) -> None:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas={list(value)}: both must lie in [0, 1).")


@attrs.frozen(kw_only=True)
class BatchPlan:
    """What the invariants of a run come to on a given number of processes.

    Attributes:
        world_size: processes, one device each.
        group_size, rollout_batch_size, micro_batch_size: as in the recipe.
        num_steps, trained_steps: T, and how many of the steps (or draws) of a rollout are learned from.
        prompts, rollouts: of one rollout batch, over all processes.
        prompts_per_device, rollouts_per_device: of one process; groups are never split.
        rollout_passes: chunks that a process samples one after the other.
        optimizer_steps: per rollout batch.
        rollouts_per_step: behind one optimiser step, over all processes.
        micro_batches: forward and backward passes of a process for one optimiser step, at most: groups without
            advantage are skipped.
        total_rollouts, total_optimizer_steps: of the whole run.
    """

    world_size: int
    num_steps: int
    trained_steps: int
    group_size: int
    rollout_batch_size: int
    micro_batch_size: int
    prompts: int
    rollouts: int
    prompts_per_device: int
    rollouts_per_device: int
    rollout_passes: int
    optimizer_steps: int
    rollouts_per_step: int
    micro_batches: int
    total_rollouts: int
    total_optimizer_steps: int

    def table(self) -> str:
        """The plan as text."""
        rows = [
            ("processes", f"{self.world_size}"),
            ("per iteration", f"{self.prompts} prompts x {self.group_size} rollouts = {self.rollouts} images"),
            ("per device", f"{self.prompts_per_device} prompts = {self.rollouts_per_device} images"),
            (
                "sampling",
                f"{self.rollout_passes} passes of up to {self.rollout_batch_size} images, {self.num_steps} steps each",
            ),
            (
                "optimiser steps",
                f"{self.optimizer_steps} per iteration, each from {self.rollouts_per_step} images",
            ),
            (
                "learning",
                f"{self.trained_steps} of {self.num_steps} steps: up to {self.micro_batches} micro-batches of "
                f"{self.micro_batch_size} sequences per device and optimiser step",
            ),
            ("whole run", f"{self.total_rollouts} images, {self.total_optimizer_steps} optimiser steps"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def derive_batch(train: TrainConfig, *, world_size: int, num_steps: int, trained_steps: int) -> BatchPlan:
    """The batch arithmetic of a run.

    Args:
        train: the invariants.
        world_size: number of processes.
        num_steps: T, denoising steps of a rollout.
        trained_steps: steps (or draws of sigma) of a rollout that the objective learns from.

    Raises:
        ValueError: when whole groups cannot be shared out evenly, with the nearest numbers that work.
    """
    prompts, share = train.prompts_per_iteration, world_size * train.optimizer_steps_per_iteration
    if prompts % share:
        below, above = prompts // share * share, (prompts // share + 1) * share
        sizes = [n for n in range(1, prompts + 1) if prompts % (n * train.optimizer_steps_per_iteration) == 0]
        ways = [f"train.prompts_per_iteration={' or '.join(str(n) for n in (below, above) if n)}"]
        if sizes:
            ways.append(f"{_listed(sizes)} processes")
        raise ValueError(
            f"train.prompts_per_iteration={prompts} cannot be shared out to {world_size} processes x "
            f"{train.optimizer_steps_per_iteration} optimiser steps: the {train.group_size} rollouts of a prompt stay "
            f"on one process and in one step, so it must be a multiple of {share}. Use {', or '.join(ways)}."
        )
    _check_sizes(train, world_size=world_size)
    rollouts = prompts * train.group_size
    per_device = rollouts // world_size
    pairs = per_device * trained_steps // train.optimizer_steps_per_iteration
    kinds = len(set(train.sizes)) or 1  # of batches: each is of one size
    return BatchPlan(
        world_size=world_size,
        num_steps=num_steps,
        trained_steps=trained_steps,
        group_size=train.group_size,
        rollout_batch_size=min(train.rollout_batch_size, per_device),
        micro_batch_size=train.micro_batch_size,
        prompts=prompts,
        rollouts=rollouts,
        prompts_per_device=prompts // world_size,
        rollouts_per_device=per_device,
        rollout_passes=kinds * -(-per_device // (kinds * train.rollout_batch_size)),
        optimizer_steps=train.optimizer_steps_per_iteration,
        rollouts_per_step=rollouts // train.optimizer_steps_per_iteration,
        micro_batches=kinds * -(-pairs // (kinds * train.micro_batch_size)),
        total_rollouts=rollouts * train.iterations,
        total_optimizer_steps=train.iterations * train.optimizer_steps_per_iteration,
    )


def _check_sizes(train: TrainConfig, *, world_size: int) -> None:
    """Every size must have equally many groups on every process and in every optimiser step.

    Raises:
        ValueError: with numbers of prompts that work.
    """
    prompts, share, sizes = train.prompts_per_iteration, world_size * train.optimizer_steps_per_iteration, train.sizes
    if not sizes or share == 1:
        return
    step = math.lcm(*(len(sizes) * share // math.gcd(share, sizes.count(size)) for size in set(sizes)))
    if prompts % step:
        near = " or ".join(str(n) for n in (prompts // step * step, (prompts // step + 1) * step) if n)
        raise ValueError(
            f"train.prompts_per_iteration={prompts} cannot be dealt to {len(sizes)} sizes x {world_size} processes x "
            f"{train.optimizer_steps_per_iteration} optimiser steps: batches are of one size, and processes work side "
            f"by side, so it must be a multiple of {step}. Use train.prompts_per_iteration={near}."
        )


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
