"""Diffusion-DPO: prefer one image to the other more than the starting policy does."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from attrs import validators

from rlt2i.interfaces import Needs, Objective, Policy, UpdateContext
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.preference import preference_losses
from rlt2i.types import Experience, Loss


@attrs.frozen(kw_only=True)
class DiffusionDPO(Objective):
    """L = -log sigmoid(-beta / 2 [(e_w - e_w^ref) - (e_l - e_l^ref)]), e = mean_p w_p |v - (eps - x_0)|^2.

    Diffusion-DPO (arXiv 2311.12908) in the form for flows. The anchor is the policy that training started
    from, for ever: a statement about data that do not change. Winner and loser are the rollouts of largest and smallest
    advantage of a group and share noise and noise level. `OnlineDPO` is the same with an anchor that follows.

    Attributes:
        beta: strength of the preference, for errors that are means over latent dimensions; the paper's 2000 to 5000
            have a factor T absorbed.
        sigmas: the noise levels trained at.
    """

    beta: float = attrs.field(default=100.0, validator=validators.gt(0))
    sigmas: SigmaDraws = attrs.field(factory=SigmaDraws)

    @property
    def needs(self) -> Needs:
        return Needs(parameter_sets={"reference"}, groups=True, rows="groups")

    def losses(self, policy: Policy, experience: Experience, *, context: UpdateContext) -> Iterator[Loss]:
        yield from preference_losses(
            policy, experience, context=context, beta=self.beta, sigmas=self.sigmas, anchor="reference"
        )
