"""NormGuard: any objective, and a hinge on how long the policy's velocity may get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.functional.norms import norm_excess
from rlt2i.interfaces import Needs, Objective, Policy, Sampler, UpdateContext
from rlt2i.types import Conditioning, Experience, Loss


@attrs.frozen(kw_only=True)
class NormGuard(Objective):
    """L + weight mean max(|v| - |v_ref|, 0)  (arXiv 2606.27771), L any other objective's loss.

    Chasing a reward makes velocities longer than the reference's by several per cent, which shows as over-saturated
    images. The hinge acts on exactly the states at which L asks the policy for its velocity with a gradient, and
    nowhere below the reference's norm; a micro-batch counts as much as it does in L.

    Attributes:
        objective: whose loss it is.
        weight: strength of the hinge, on norms that are roots of means.
    """

    objective: Objective
    weight: float = attrs.field(default=0.1, validator=validators.gt(0))

    @property
    def uses_advantage(self) -> bool:
        return self.objective.uses_advantage

    @property
    def rollout_weights(self) -> Literal["online", "old"]:
        return self.objective.rollout_weights

    @property
    def needs(self) -> Needs:
        needs = self.objective.needs
        return attrs.evolve(needs, parameter_sets=needs.parameter_sets | {"reference"})

    def trained_steps(self, sampler: Sampler) -> int:
        return self.objective.trained_steps(sampler)

    def old_decay(self, optimizer_step: int) -> float:
        return self.objective.old_decay(optimizer_step)

    def starting_values(self, name: str) -> Mapping[str, Tensor] | None:
        return self.objective.starting_values(name)

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        calls, heard = _Calls(policy), _heard(context)
        for loss in self.objective.losses(calls, experience, context=heard):  # type: ignore[arg-type]
            excess = []
            for velocity, arguments in calls.taken():
                with torch.no_grad(), context.weights("reference"):
                    reference = policy.velocity(*arguments)
                excess.append(norm_excess(velocity, reference))
            if not excess:
                yield loss
                continue
            hinge = torch.cat(excess)
            share = self._share(heard.pairs[-1], experience.num_rollouts, context)
            metrics = {"norm/excess": hinge.detach(), "norm/above": (hinge.detach() > 0).float()}
            yield attrs.evolve(
                loss,
                value=loss.value + self.weight * share * hinge.mean(),
                metrics={**loss.metrics, **(metrics if loss.steps is None else _as_many(metrics, len(loss.steps)))},
            )

    def _share(self, pairs: _Pairs, num_rollouts: int, context: UpdateContext) -> float | Tensor:
        """The part of the update's mean that a micro-batch stands for."""
        if self.objective.needs.noise:
            return len(pairs.rows) / context.num_pairs
        whole = context.num_rollouts if len(pairs.trainable) == num_rollouts else context.num_groups
        return (1 / pairs.trainable.sum(dim=1).clamp_min(1)[pairs.rows].float()).sum() / whole


@attrs.frozen(kw_only=True, eq=False)
class _Pairs:
    """What a micro-batch was cut from, [rows, draws] bool, and its rows [N]."""

    trainable: Tensor
    rows: Tensor


@attrs.frozen(kw_only=True, eq=False)
class _Heard(UpdateContext):
    """A context that remembers the micro-batch that was last handed out."""

    pairs: list[_Pairs]

    def handed_out(self, trainable: Tensor, rows: Tensor) -> None:
        self.pairs[:] = [_Pairs(trainable=trainable, rows=rows)]


def _heard(context: UpdateContext) -> _Heard:
    fields = {field.name: getattr(context, field.name) for field in attrs.fields(UpdateContext)}
    return _Heard(pairs=[], **fields)


class _Calls:
    """A policy that remembers the velocities it was asked for with a gradient."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._made: list[tuple[Tensor, tuple[Tensor, Tensor, Conditioning]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self._noted(self._policy.velocity(latents, sigma, conditioning), latents, sigma, conditioning)

    def velocity_again(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, recorded: Mapping[str, Tensor]
    ) -> Tensor:
        velocity = self._policy.velocity_again(latents, sigma, conditioning, recorded)
        return self._noted(velocity, latents, sigma, conditioning)

    def _noted(self, velocity: Tensor, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if velocity.requires_grad:
            self._made.append((velocity, (latents.detach(), sigma, conditioning)))
        return velocity

    def taken(self) -> list[tuple[Tensor, tuple[Tensor, Tensor, Conditioning]]]:
        """The velocities since it was last asked, each with what it was made from."""
        made, self._made = self._made, []
        return made


def _as_many(metrics: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """[N] of each, where the network was asked for more rows than the loss has: their means."""
    return {k: v if len(v) == count else v.mean().expand(count) for k, v in metrics.items()}
