"""miles_diffusion's samples and train pairs in the words of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.bridges.experience import ENGINE_ADVANTAGE, EnginePolicy, regions_of
from rlt2i.functional.transitions import clean_prediction
from rlt2i.samplers.kernels import CPS, FlowSDE
from rlt2i.types import Conditioning, Rewards, Trajectory, TransitionKernel


@attrs.define
class RecordedVelocity:
    """The velocities that the actor computed before it asked for the loss."""

    now: Tensor
    reference: Tensor | None
    _of_reference: bool = False

    def as_policy(self) -> EnginePolicy:
        return EnginePolicy(predict=self._predict)

    def _predict(self, latents: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return (self.reference if self._of_reference else self.now)[rows]  # type: ignore[index]

    @contextmanager
    def under(self, name: str) -> Iterator[None]:
        if self.reference is None:
            raise ValueError(
                f"the objective needs the {name!r} policy and the actor ran none. Pass --diffusion-kl-beta > 0 with "
                "--use-lora, or use kl_penalty.weight=0."
            )
        self._of_reference = True
        yield
        self._of_reference = False


def rewards_of(raw: Sequence[float], samples: Sequence[Any], advantage: Sequence[float] | None = None) -> Rewards:
    """Rewards of B samples; those that are not finite are invalid."""
    values = torch.tensor(list(raw), dtype=torch.float32)
    valid = torch.isfinite(values)
    return Rewards(
        values=torch.where(valid, values, 0)[:, None],
        valid=valid,
        terms={} if advantage is None else {ENGINE_ADVANTAGE: torch.tensor(list(advantage), dtype=torch.float32)},
        regions=regions_of([sample.metadata or {} for sample in samples]),
    )


def kernel_of(args: Any) -> TransitionKernel:
    """The transition kernel that the flags name.

    Raises:
        ValueError: when it has no log-probability.
    """
    kind, level = getattr(args, "diffusion_sde_type", "sde"), float(args.diffusion_noise_level)
    if kind not in ("sde", "cps") or level == 0:
        raise ValueError(
            f"--diffusion-sde-type {kind} --diffusion-noise-level {level:g} has no log-probability per place. "
            "Use sde or cps, and a noise level above 0."
        )
    return CPS(noise_level=level) if kind == "cps" else FlowSDE(noise_level=level)


def cell(field: Tensor, row: int, step: int) -> Tensor:
    """[1|h, 1|w] of a credit field at one rollout and step."""
    return field[row if len(field) > 1 else 0, step if field.shape[1] > 1 else 0].clone()


def clean_predictions(samples: Sequence[Any], latents: Tensor, sigmas: Tensor) -> Tensor:
    """[B, T, C, H, W] from the velocities that the rollout engine kept.

    Raises:
        ValueError: when it kept none.
    """
    kept = [getattr(sample.rollout_debug_tensors, "rollout_model_outputs", None) for sample in samples]
    if any(velocity is None for velocity in kept):
        raise ValueError(
            "this credit reads the rollout's clean predictions, and the rollout engine kept no velocities. Pass "
            "--diffusion-debug-mode, or use a credit that does not need them, such as TextAttention()."
        )
    velocity = torch.stack([v.float() for v in kept])  # type: ignore[union-attr]
    num, steps = velocity.shape[:2]
    level = sigmas[:-1].repeat(num)
    return clean_prediction(latents[:, :-1].flatten(0, 1), velocity.flatten(0, 1), level).unflatten(0, (num, steps))


def pairs_as_rollouts(ctx: Any, prepared: Any, steps: Tensor) -> Trajectory:
    """N (sample, step) pairs as N rollouts that are known at one step each."""
    sigmas = ctx.scheduler.sigmas.to(steps.device, torch.float32)
    states, after = prepared.latents.float(), prepared.extras["next_latents"].float()
    num, rows = len(states), torch.arange(len(states), device=steps.device)
    latents = states.new_zeros(num, len(sigmas), *states.shape[1:])
    latents[rows, steps], latents[rows, steps + 1] = states, after
    return Trajectory(
        latents=latents,
        sigmas=sigmas,
        log_probs=states.new_zeros(1, 1, 1, 1).expand(num, len(sigmas) - 1, *states.shape[-2:]),
        stochastic=torch.ones(len(sigmas) - 1, dtype=torch.bool, device=steps.device),
        kernel=kernel_of(ctx.args),
        conditioning=Conditioning(tensors={}, rows=rows),
        group_size=1,
    )


@torch.no_grad()
def log_prob_maps(trajectory: Trajectory, velocity: Tensor, rows: Tensor, steps: Tensor) -> Tensor:
    """[N, H, W] of the pairs under the given velocities."""
    sigma, sigma_next = trajectory.sigmas[steps], trajectory.sigmas[steps + 1]
    transition = trajectory.transition(trajectory.latents[rows, steps], velocity.float(), sigma, sigma_next)
    return trajectory.log_prob_map(trajectory.latents[rows, steps + 1], transition)


def old_log_prob_maps(batch: Sequence[Mapping[str, Any]]) -> Tensor:
    """[N, H, W] old log-probabilities that an earlier pass wrote.

    Raises:
        ValueError: when there was no such pass.
    """
    if any("log_prob_old_map" not in pair for pair in batch):
        raise ValueError(
            "the rollout engine returns one log-probability per sample and step, and this objective needs them "
            "place by place. Pass --diffusion-recompute-old-log-prob, so that the actor makes them again."
        )
    return torch.stack([pair["log_prob_old_map"] for pair in batch])
