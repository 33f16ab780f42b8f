"""DenseFlow: the reward counts for as much of a place as is not damaged, and every place is compared with itself."""

from __future__ import annotations

import attrs
from attrs import validators
from torch import Tensor

from rlt2i.credit.algebra import Advantage
from rlt2i.credit.places import JUDGED, judged_map
from rlt2i.functional.place_rewards import dense_flow_rewards, place_relative_advantage
from rlt2i.interfaces import CreditContext, Needs


@attrs.frozen(kw_only=True)
class DenseFlow(Advantage):
    """R_p = R (1 - D_p), normalised per place over the group (DenseFlow-GRPO, ImageDoctor, arXiv 2510.01010).

    D is the damage, where the reward's regions hurt and as far as they did (in the paper a model's heat map). The paper
    has it with ClippedSurrogate's form="detached".

    Attributes:
        min_std: floor of a place's standard deviation, in the unit of the reward.
        clip: bound on the absolute advantage.
    """

    min_std: float = attrs.field(default=0.1, validator=validators.gt(0))
    clip: float = attrs.field(default=5.0, validator=validators.gt(0))

    @property
    def needs(self) -> Needs:
        return JUDGED

    def advantage(self, context: CreditContext) -> Tensor:
        rewards, size = context.rewards, context.group_size
        damage = judged_map(context, who="DenseFlow").clamp(max=0).neg()
        places = dense_flow_rewards(rewards.final, damage)
        advantage = place_relative_advantage(
            places, size, size=rewards.final, min_std=self.min_std, valid=rewards.valid
        )
        return advantage.clamp(-self.clip, self.clip).float()[:, None]
