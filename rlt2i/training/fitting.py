"""Does a run fit a device, how long does an iteration take there, and what is the smallest change that makes it fit?

Only settings of which a run's results do not depend (beyond the last bits) are changed: where the text encoders stay,
how many rollouts and sequences pass through the network at once, and whether activations are computed twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import attrs

from rlt2i.config.references import did_you_mean
from rlt2i.policies.cost import Plan
from rlt2i.recipes.recipe import Recipe
from rlt2i.training.dry_run import batch_plan, plan_of

GIB = 2**30
SLACK = 1.1
"""The allocator's blocks and the workspaces of kernels, over the peak that is counted."""
CONTEXT = 1.0 * GIB
"""What CUDA itself takes."""
UTILISATION = 0.35
"""Share of a device's stated rate that a run is assumed to reach. Assumed, not measured here."""


@attrs.frozen(kw_only=True)
class Device:
    """One accelerator.

    Attributes:
        name: of the product, or its memory where nothing else is known.
        memory: bytes.
        rate: dense bfloat16 operations per second with float32 sums, as the maker states them; None where unknown.
    """

    name: str
    memory: float
    rate: float | None = None

    def __str__(self) -> str:
        size = f"{self.memory / GIB:.4g} GB"
        return size if self.name == size else f"{size} ({self.name})"


def _device(name: str, gib: float, tera: float) -> Device:
    return Device(name=name, memory=gib * GIB, rate=tera * 1e12)


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _device("rtx3090", 24, 71),
        _device("rtx4090", 24, 165),
        _device("rtx5090", 32, 209),
        _device("l40s", 48, 362),
        _device("a100-40gb", 40, 312),
        _device("a100", 80, 312),
        _device("h100", 80, 989),
        _device("h200", 141, 989),
        _device("b200", 180, 2250),
    )
}
"""Devices by name, from their makers' data sheets."""


def find_device(text: str) -> Device:
    """A device by name (`rtx4090`) or by its memory alone (`24GB`).

    Raises:
        ValueError: for anything else.
    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*G(?:i?B)?", text.strip(), flags=re.IGNORECASE):
        if float(match[1]) > 0:
            return Device(name=f"{float(match[1]):.4g} GB", memory=float(match[1]) * GIB)
    elif (name := text.strip().lower().replace(" ", "")) in DEVICES:
        return DEVICES[name]
    raise ValueError(
        f"--gpu {text!r}: write its memory (24GB) or one of {', '.join(DEVICES)}.{did_you_mean(text.lower(), DEVICES)}"
    )


def needed(peak: float) -> float:
    """Bytes of a device that a counted peak takes."""
    return peak * SLACK + CONTEXT


def tight_phases(plan: Plan, device: Device) -> list[str]:
    """The phases of an iteration that do not fit."""
    return [phase for phase, peak in plan.memory.items() if needed(peak) > device.memory]


def seconds_per_iteration(plan: Plan, rollouts: int, device: Device) -> float | None:
    """Seconds that the counted arithmetic takes at `UTILISATION`, without rewards; None where the rate is unknown.

    Args:
        rollouts: of one process.
    """
    if device.rate is None:
        return None
    return (plan.rollout_flops + rollouts * plan.decode_flops + plan.update_flops) / (device.rate * UTILISATION)


def verdict(plan: Plan, recipe: Recipe, device: Device, *, world_size: int) -> str:
    """What `rlt2i plan --gpu` says below the table."""
    worst = max(plan.memory, key=lambda phase: plan.memory[phase])
    wanted, tight = needed(plan.memory[worst]) / GIB, tight_phases(plan, device)
    lines = [
        f"{'does not fit' if tight else 'fits'} in {device}: {wanted:.1f} GiB in "
        f"{worst}, with {SLACK - 1:.0%} for the allocator and {CONTEXT / GIB:.0f} GiB for CUDA"
    ]
    rollouts = batch_plan(recipe, world_size=world_size).rollouts_per_device
    if (seconds := seconds_per_iteration(plan, rollouts, device)) is not None:
        lines.append(
            f"about {seconds:,.0f} s per iteration on {world_size} x {device.name}, if {UTILISATION:.0%} of its stated "
            "rate are reached (assumed, unmeasured); rewards come on top"
        )
    return "\n".join(lines)


class DoesNotFitError(ValueError):
    """A run that no harmless change makes fit."""


def fit(recipe: Recipe, device: Device, *, world_size: int = 1, counted: Plan | None = None) -> tuple[Recipe, Plan]:
    """The recipe with the smallest change that makes it fit, and its plan.

    In this order, each only as far as it is needed: text encoders leave the device, the negative
    prompt is computed again, fewer rollouts at once, fewer
    sequences at once, activations are computed twice. Batches are halved; how far is read from the line between the
    recipe's own batch and the smallest one (peaks are convex in the batch, so the line is never too low), then counted.

    Args:
        counted: the plan of `recipe`, where it is known already.

    Raises:
        DoesNotFitError: when it does not fit even so, with what takes the memory.
        ValueError: when the recipe cannot be counted.
    """
    plan = counted or _plan(recipe, world_size)
    if not tight_phases(plan, device):
        return recipe, plan
    if getattr(recipe.policy, "text_encoders", "") == "device":
        recipe = _policy(recipe, text_encoders="cpu")
        gone = plan.resident["text encoders"]
        memory = {phase: peak - (phase != "encode") * gone for phase, peak in plan.memory.items()}
        plan = attrs.evolve(plan, memory=memory)
    if tight_phases(plan, device) and plan.resident.get("negative velocities"):
        recipe = _policy(recipe, reuse_negative=False)
        plan = _plan(recipe, world_size)
    if not tight_phases(plan, device):
        return recipe, plan
    changed, plan = _smaller_batches(recipe, plan, device, world_size)
    if "update" in tight_phases(plan, device) and not changed.policy.gradient_checkpointing:  # type: ignore[attr-defined]
        changed = _train(changed, micro_batch_size=recipe.train.micro_batch_size)
        changed = _policy(changed, gradient_checkpointing=True)
        changed, plan = _smaller_batches(changed, _plan(changed, world_size), device, world_size)
    if tight := tight_phases(plan, device):
        parts = sorted(plan.resident.items(), key=lambda item: -item[1])[:3]
        largest = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in parts)
        adapters = " Train adapters (policy.lora_rank=32)." if recipe.policy.lora_rank is None else ""  # type: ignore[attr-defined]
        raise DoesNotFitError(
            f"{recipe.name} does not fit in {device}: {tight[0]} takes "
            f"{needed(plan.memory[tight[0]]) / GIB:.1f} GiB even with the smallest batches. What stays in memory: "
            f"{largest}.{adapters} Otherwise fewer train.prompts_per_iteration, a smaller train.image_size, a smaller "
            "backbone or a larger device."
        )
    return changed, plan


def overrides(before: Recipe, after: Recipe) -> list[str]:
    """What `fit` changed, as `section.field=value`."""
    settings = []
    for section, fields in (
        ("policy", ("text_encoders", "reuse_negative", "gradient_checkpointing")),
        ("train", tuple(_PHASES)),
    ):
        old, new = getattr(before, section), getattr(after, section)
        for field in fields:
            if (value := getattr(new, field, None)) != getattr(old, field, None):
                settings.append(f"{section}.{field}={str(value).lower()}")
    return settings


_PHASES: Mapping[str, str] = {"rollout_batch_size": "rollout", "micro_batch_size": "update"}
"""Batch size -> the phase whose peak it sets."""


def _plan(recipe: Recipe, world_size: int) -> Plan:
    return plan_of(recipe, batch_plan(recipe, world_size=world_size))


def _policy(recipe: Recipe, **changes: object) -> Recipe:
    return attrs.evolve(recipe, policy=attrs.evolve(recipe.policy, **changes))  # type: ignore[misc]


def _train(recipe: Recipe, **changes: int) -> Recipe:
    return attrs.evolve(recipe, train=attrs.evolve(recipe.train, **changes))  # type: ignore[arg-type]


def _halves(recipe: Recipe, field: str, world_size: int) -> list[int]:
    """Sizes of a batch from the recipe's own down, as far as the batches work out."""
    sizes = [getattr(recipe.train, field)]
    while sizes[-1] > 1:
        try:
            batch_plan(_train(recipe, **{field: sizes[-1] // 2}), world_size=world_size)
        except ValueError:  # a sampler that keeps a group in one pass
            break
        sizes.append(sizes[-1] // 2)
    return sizes


def _smaller_batches(recipe: Recipe, plan: Plan, device: Device, world_size: int) -> tuple[Recipe, Plan]:
    """Halved batches where a phase is tight; the smallest ones where nothing helps."""
    halves = {field: _halves(recipe, field, world_size) for field in _PHASES}
    tight = tight_phases(plan, device)
    smallest = {field: halves[field][-1] for field, phase in _PHASES.items() if phase in tight}
    if not smallest:
        return recipe, plan
    least = _plan(_train(recipe, **smallest), world_size)
    chosen = {}
    for field, size in smallest.items():
        phase, full = _PHASES[field], getattr(recipe.train, field)
        low, high = least.memory[phase], plan.memory[phase]
        line = {n: low + (high - low) * (n - size) / max(full - size, 1) for n in halves[field]}
        chosen[field] = next((n for n in halves[field] if needed(line[n]) <= device.memory), size)
    changed = _train(recipe, **chosen)
    return changed, least if chosen == smallest else _plan(changed, world_size)
