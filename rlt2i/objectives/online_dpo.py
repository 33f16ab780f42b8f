"""Online DPO: in every group, prefer the best image to the worst."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from attrs import validators

from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.preference import preference_losses
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class OnlineDPO(Objective):
    """L = -log sigmoid(-beta / 2 [(e_w - e_w^ref) - (e_l - e_l^ref)]), e = mean_p w_p |v - (eps - x_0)|^2.

    Diffusion-DPO (arXiv 2311.12908) for flows, on the pair of largest and smallest advantage of each group, with the
    same noise and noise level for both. Weight maps sit inside the logit. Where the advantage resolves steps, the pair
    is chosen for each noise level by the advantage of the nearest step. Groups whose advantages tie have no pair.

    Attributes:
        beta: strength of the preference, for errors that are means over latent dimensions.
        refresh_every: optimiser updates after which the anchor is set to the current policy; 0 keeps it for ever.
            Looked at after every rollout batch, so a multiple of optimizer_steps_per_iteration is exact.
        sigmas: the noise levels trained at.
    """

    beta: float = attrs.field(default=100.0, validator=validators.gt(0))
    refresh_every: int = attrs.field(default=40, validator=validators.ge(0))
    sigmas: SigmaDraws = attrs.field(factory=SigmaDraws)

    @property
    def needs(self) -> Needs:
        return Needs(parameter_sets={"old"}, groups=True, rows="groups")

    def old_decay(self, optimizer_step: int) -> float:
        return 0.0 if self.refresh_every and optimizer_step % self.refresh_every == 0 else 1.0

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        yield from preference_losses(
            policy, experience, context=context, beta=self.beta, sigmas=self.sigmas, anchor="old"
        )
