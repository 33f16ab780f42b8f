"""On-policy distillation: the student's own states, and at each of them what a teacher would do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import attrs
import torch
from attrs import validators
from safetensors.torch import load_file
from torch import Tensor

from rlt2i.functional.gaussian import kl_map, squared_error_map
from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.reduction import masked_mean, on_grid, share, trainable_steps
from rlt2i.objectives.reverse import NO_LIKELIHOOD
from rlt2i.runs.checkpoint import latest_checkpoint, load_checkpoint
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class OnPolicyDistillation(Objective):
    """mean w |v - v_teacher(k)|^2 on the states of the student's own rollouts, teacher k chosen by the prompt.

    Flow-OPD (arXiv 2605.08063) and DiffusionOPD (arXiv 2605.15055): specialists that were trained apart become one
    policy, without their rewards getting in each other's way. Supervision is dense by construction, over steps and
    places, so the advantage is not used; the credit's weight and mask say where it counts. Teachers are runs of the
    same policy (the same adapter): their weights are named parameter sets, exchanged in place.

    Attributes:
        teachers: name -> a run directory, whose last checkpoint teaches (its average where it kept one), or a
            .safetensors file with the policy's parameters.
        route: key of the prompts' metadata whose value names the teacher; a value without a teacher of its own goes to
            the teacher "other". Not needed for one teacher.
        form: "v" compares velocities and takes any sampler; "exact" is the KL between the two denoising steps,
            |mean - mean_teacher|^2 / (2 std^2), at the steps with noise.
    """

    uses_advantage = False

    teachers: Mapping[str, Path] = attrs.field(hash=False)
    route: str | None = None
    form: Literal["v", "exact"] = attrs.field(default="v", validator=validators.in_(("v", "exact")))

    @teachers.validator
    def _check_teachers(self, _: object, value: Mapping[str, Path]) -> None:
        if not value:
            raise ValueError("OnPolicyDistillation(teachers={}): nobody teaches. Name at least one run directory.")

    def __attrs_post_init__(self) -> None:
        if self.route is None and len(self.teachers) > 1:
            raise ValueError(
                f"OnPolicyDistillation: {len(self.teachers)} teachers and no route, so no prompt knows its own. Set "
                "route to the metadata key that tells their prompts apart."
            )

    @property
    def needs(self) -> Needs:
        return Needs(
            noise=self.form == "exact",
            parameter_sets={_set_of(name) for name in self.teachers},
            rows="valid",
            remedies=NO_LIKELIHOOD,
        )

    def starting_values(self, name: str) -> Mapping[str, Tensor] | None:
        sets = {_set_of(teacher): path for teacher, path in self.teachers.items()}
        return _weights_in(sets[name]) if name in sets else None

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        trajectory = experience.trajectory
        grid = (trajectory.latents.shape[-2], trajectory.latents.shape[-1])
        trainable = trainable_steps(experience, stochastic_only=self.form == "exact")
        for teacher, taught in self._routed(experience).items():
            for rollouts, steps in context.micro_batches(trainable & taught[:, None].to(trainable.device)):
                states = experience.step_batch(rollouts, steps)
                velocity = policy.velocity(states.latents, states.sigma, states.conditioning)
                with torch.no_grad(), context.weights(_set_of(teacher)):
                    target = policy.velocity(states.latents, states.sigma, states.conditioning)
                if self.form == "v":
                    distance = squared_error_map(velocity, target)
                else:
                    at = lambda v, s=states: trajectory.transition(s.latents, v, s.sigma, s.sigma_next)
                    own = at(velocity)
                    distance = kl_map(own.mean, at(target).mean, own.std)
                weighted = on_grid(states.weight, grid) * distance
                per_pair = masked_mean(weighted, on_grid(states.mask.float(), grid) > 0)
                yield Loss(
                    value=(per_pair * share(trainable, rollouts, context.num_rollouts)).sum(),
                    metrics={
                        "loss/distillation": per_pair.detach(),
                        f"distance/{teacher}": distance.detach().mean(dim=(1, 2)),
                    },
                    steps=steps,
                )

    def _routed(self, experience: Experience) -> dict[str, Tensor]:
        """Teacher -> [B] bool, the rollouts that it teaches; teachers without any are left out."""
        if self.route is None:
            (only,) = self.teachers
            return {only: torch.ones(experience.num_rollouts, dtype=torch.bool)}
        named = [self._teacher_of(metadata) for metadata in experience.prompts.metadata]
        return {t: torch.tensor([n == t for n in named]) for t in self.teachers if t in named}

    def _teacher_of(self, metadata: Mapping[str, object]) -> str:
        value = str(metadata.get(self.route or ""))
        teacher = value if value in self.teachers else "other"
        if teacher not in self.teachers:
            raise ValueError(
                f"OnPolicyDistillation(route={self.route!r}): a prompt has {value!r} there, and the teachers are "
                f"{sorted(self.teachers)}. Name a teacher {value!r}, or one called 'other' for the rest."
            )
        return teacher


def _set_of(teacher: str) -> str:
    return f"teacher-{teacher}"


def _weights_in(path: Path) -> Mapping[str, Tensor]:
    """The policy's parameters by name.

    Raises:
        ValueError: where there are none.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return load_file(path)
    checkpoint = latest_checkpoint(path) if path.is_dir() else None
    if checkpoint is None:
        raise ValueError(
            f"OnPolicyDistillation: no teacher at {path}. Train it first (`rlt2i train RECIPE --run-dir {path}`), or "
            "name a .safetensors file with the policy's parameters."
        )
    tensors = load_checkpoint(checkpoint).tensors
    return tensors.get("ema", tensors["online"])
