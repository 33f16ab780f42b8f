"""DenseFlow: the reward counts for as much of a place as is not damaged, and every place is compared with itself."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.credit.places import PlaceAdvantage, judged_map
from rlt2i.functional.place_rewards import dense_flow_rewards
from rlt2i.interfaces import CreditContext


@attrs.frozen(kw_only=True)
class DenseFlow(PlaceAdvantage):
    """R_p = R (1 - D_p), normalised per place over the group (DenseFlow-GRPO, ImageDoctor, arXiv 2510.01010).

    D is the damage, where the reward's regions hurt and as far as they did (in the paper a model's heat map). The paper
    has it with ClippedSurrogate's form="detached".

    Attributes:
        min_std: floor of a place's standard deviation, in the unit of the reward.
        clip: bound on the absolute advantage.
    """

    def advantage(self, context: CreditContext) -> Tensor:
        damage = judged_map(context, who="DenseFlow").clamp(max=0).neg()
        places = dense_flow_rewards(context.rewards.final, damage)
        return self.compared(places, context)
