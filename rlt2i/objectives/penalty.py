"""KL to the reference policy: what holds a policy back, said once for all objectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.functional.awm import AWMKLWeighting, awm_kl_map
from rlt2i.functional.gaussian import KLForm, reference_kl_map
from rlt2i.functional.maps import inverted_map
from rlt2i.interfaces import Policy, UpdateContext
from rlt2i.objectives.reduction import on_grid
from rlt2i.objectives.reverse import Step, denoising_step
from rlt2i.types import StepBatch, Trajectory

Where = Literal["uniform", "credit", "inverse"]
"""Where a penalty holds the policy back: everywhere alike, where the credit's weights are high, or where low."""

Added = tuple[Tensor, dict[str, Tensor]]
"""[N] losses with the penalty, and what is worth logging about it."""


@attrs.frozen(kw_only=True)
class Penalty(ABC):
    """weight mean_p w_p D_p, added to the loss of a (rollout, step) pair; D is a distance to the reference policy.

    Attributes:
        weight: its strength; 0 needs no reference policy.
        where: the map w: 1, the credit's weight, or that weight inverted.
    """

    weight: float = attrs.field(default=0.0, validator=validators.ge(0))
    where: Where = attrs.field(default="uniform", validator=validators.in_(("uniform", "credit", "inverse")))

    ONCE_FLAT: ClassVar[Mapping[str, str]] = {"kl_weight": "weight", "kl": "form", "kl_map": "where"}

    @property
    @abstractmethod
    def form(self) -> str:
        """Which distance D is."""

    @property
    def parameter_sets(self) -> frozenset[str]:
        """The parameter sets that it needs."""
        return frozenset({"reference"} if self.weight > 0 else ())

    def mean(self, divergence: Tensor, states: StepBatch) -> Tensor:
        """[N] of a map [N, H, W]."""
        return (_map(self.where, states, divergence) * divergence).mean(dim=(1, 2))

    def plus(self, loss: Tensor, distance: Tensor, scale: Tensor | None = None) -> Added:
        """The losses with the penalty of known distances.

        Args:
            loss, distance: [N].
            scale: [N] share of the weight that each pair gets; None is all of it.
        """
        weight = self.weight if scale is None else self.weight * scale
        return loss + weight * distance, {"kl/reference": distance.detach()}


@attrs.frozen(kw_only=True)
class KLPenalty(Penalty):
    """Between denoising steps, for objectives on the reverse process.

    Attributes:
        weight: beta; 0 needs no reference policy.
        form: "flow_grpo" is |dt| times the true KL per coordinate, as the published betas assume; "exact" the true KL;
            "v" mean (v - v_reference)^2; "x" mean (x - x_reference)^2 of the steps' means. The same beta is another
            strength in each.
        where: the penalty acts everywhere ("uniform"), as the credit's weights ("credit"), or as their inverse.
    """

    form: KLForm = attrs.field(default="flow_grpo", validator=validators.in_(("flow_grpo", "exact", "v", "x")))

    def add(
        self,
        loss: Tensor,
        policy: Policy,
        trajectory: Trajectory,
        states: StepBatch,
        now: Step,
        context: UpdateContext,
    ) -> Added:
        """The losses [N] with the penalty on the steps `now` that the policy takes from `states`."""
        if self.weight == 0:
            return loss, {}
        with torch.no_grad(), context.weights("reference"):
            reference = denoising_step(policy, trajectory, states)
        divergence = reference_kl_map(
            now.transition, reference.transition, now.velocity, reference.velocity, form=self.form
        )
        return self.plus(loss, self.mean(divergence, states))


@attrs.frozen(kw_only=True)
class VelocityPenalty(Penalty):
    """Between velocities at one noisy state, for objectives without likelihoods.

    Attributes:
        weight: its strength; 0 needs no reference policy.
        form: "uniform" is mean (v - v_reference)^2 at every noise level, "elbo" that divided by 2 s(sigma)^2 (AWM,
            arXiv 2509.25050).
        where: the penalty acts everywhere ("uniform"), as the credit's weights ("credit"), or as their inverse.
    """

    form: AWMKLWeighting = attrs.field(default="uniform", validator=validators.in_(("uniform", "elbo")))

    def add(
        self,
        loss: Tensor,
        velocity: Tensor,
        policy: Policy,
        states: StepBatch,
        context: UpdateContext,
        *,
        latents: Tensor,
        sigma: Tensor,
        scale: Tensor | None = None,
    ) -> Added:
        """The losses with the penalty on velocities.

        Args:
            loss: [N].
            velocity: [N, C, H, W] of the policy at `latents`; gradients flow.
            states: whose conditioning and credit apply.
            latents: [N, C, H, W].
            sigma: [N] their noise level.
            scale: [N] share of the weight that each pair gets; None is all of it.
        """
        if self.weight == 0:
            return loss, {}
        with torch.no_grad(), context.weights("reference"):
            reference = policy.velocity(latents, sigma, states.conditioning)
        return self.plus(loss, self.distance(velocity, reference, states, sigma), scale)

    def distance(self, velocity: Tensor, other: Tensor, states: StepBatch, sigma: Tensor) -> Tensor:
        """[N] between two velocities [N, C, H, W] at noise levels [N]; the gradient is that of the first."""
        return self.mean(awm_kl_map(velocity, other, sigma, weighting=self.form), states)


def _map(where: Where, states: StepBatch, like: Tensor) -> Tensor:
    """The map of a penalty, broadcastable to `like` [N, H, W]."""
    if where == "uniform":
        return like.new_ones(1, 1, 1)
    weight = on_grid(states.weight, (like.shape[1], like.shape[2]))
    return weight if where == "credit" else inverted_map(weight)
