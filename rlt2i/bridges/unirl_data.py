"""UniRL's batches in the words of this package, and credit in UniRL's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlt2i.bridges.experience import ENGINE_ADVANTAGE
from rlt2i.bridges.versions import extension_points
from rlt2i.samplers.kernels import CPS, DanceSDE, FlowSDE
from rlt2i.seeds import derive_seed
from rlt2i.types import Conditioning, Rewards, Trajectory, TransitionKernel

SINCE = "unirl 0.2.0 or newer: pip install 'unirl>=0.2.0' (Python >= 3.12)"
Batch, FieldKind = extension_points("unirl", "unirl.distributed.tensor.batch", ("Batch", "FieldKind"), since=SINCE)
(LatentSegment,) = extension_points("unirl", "unirl.types.segments.latent", ("LatentSegment",), since=SINCE)
_PER_ROLLOUT = {"kind": FieldKind.CONCAT}


@dataclasses.dataclass
class SegmentCredit(Batch):  # type: ignore[misc, valid-type]
    """Credit of B rollouts in a form that UniRL cuts into micro-batches: every field has one row per rollout."""

    advantage: Tensor | None = dataclasses.field(default=None, metadata=_PER_ROLLOUT)
    weight: Tensor | None = dataclasses.field(default=None, metadata=_PER_ROLLOUT)
    mask: Tensor | None = dataclasses.field(default=None, metadata=_PER_ROLLOUT)
    keys: Tensor | None = dataclasses.field(default=None, metadata=_PER_ROLLOUT)
    groups: Tensor | None = dataclasses.field(default=None, metadata=_PER_ROLLOUT)


@dataclasses.dataclass
class CreditedSegment(LatentSegment):  # type: ignore[misc, valid-type]
    """UniRL's latent trajectory with its credit beside it."""

    credit: SegmentCredit | None = dataclasses.field(default=None, metadata=_PER_ROLLOUT)


def trajectory_of(segment: Any, kernel: TransitionKernel, *, group_size: int = 1) -> Trajectory:
    """The rollouts of a segment.

    UniRL stores the states beside stochastic steps only; the others repeat the latest one, and nobody trains them.
    Log-probabilities are 0 until somebody computes them.

    Raises:
        ValueError: when the latents do not have two axes in space.
    """
    if segment.latents is None or segment.latents.ndim != 5:
        shape = None if segment.latents is None else tuple(segment.latents.shape)
        raise ValueError(
            f"segment.latents: got shape {shape}, expected [B, stored steps, C, H, W]. Credit over places needs "
            "latents with two axes in space; this stage packs them, or makes video."
        )
    sigmas = segment.sigmas.to(segment.latents.device, torch.float32)
    stored = segment.indices.tolist()
    latest = [max((i for i, step in enumerate(stored) if step <= t), default=0) for t in range(len(sigmas))]
    stochastic = torch.zeros(len(sigmas) - 1, dtype=torch.bool, device=sigmas.device)
    stochastic[stochastic_steps(segment)] = True
    latents: Tensor = segment.latents[:, latest].float()
    num, (height, width) = len(latents), latents.shape[-2:]
    return Trajectory(
        latents=latents,
        sigmas=sigmas,
        log_probs=latents.new_zeros(1, 1, 1, 1).expand(num, len(stochastic), height, width),
        stochastic=stochastic,
        kernel=kernel,
        conditioning=Conditioning(tensors={}, rows=torch.arange(num, device=latents.device)),
        group_size=group_size,
    )


def stochastic_steps(segment: Any) -> list[int]:
    """The steps that the rollout drew noise at."""
    return [] if segment.sde_indices is None else segment.sde_indices.tolist()


def kernel_of(strategy: Any, eta: float) -> TransitionKernel:
    """The transition kernel that UniRL calls a strategy.

    Raises:
        ValueError: when the strategy is none of those that have a log-probability.
    """
    if eta == 0:
        return FlowSDE()  # never consulted: no step is stochastic
    name = getattr(strategy, "canonical_name", None)
    if name == "flow":
        return FlowSDE(noise_level=eta)
    if name == "cps":
        return CPS(noise_level=eta)
    if name == "dance":
        return DanceSDE(eta=eta)
    raise ValueError(
        f"{type(strategy).__name__} has no log-probability per place here. Use UniRL's FlowSDEStrategy, "
        "CPSSDEStrategy or DanceSDEStrategy."
    )


def rewards_of(part: Any) -> Rewards:
    """The rewards of a part; those that are not finite are invalid."""
    num, device = len(part.sample_ids), part.segment.latents.device
    values = torch.zeros(num, device=device) if part.rewards is None else part.rewards.to(device, torch.float32)
    valid = torch.isfinite(values)
    terms = {name: term.to(device, torch.float32) for name, term in (part.component_rewards or {}).items()}
    if part.advantages is not None:
        terms[ENGINE_ADVANTAGE] = part.advantages.to(device, torch.float32)
    return Rewards(values=torch.where(valid, values, 0)[:, None], valid=valid, terms=terms)


def identities(names: Sequence[str], device: torch.device) -> Tensor:
    """[len(names)] long, one number per name."""
    return torch.tensor([derive_seed(name) for name in names], dtype=torch.long, device=device)
