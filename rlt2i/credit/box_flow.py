"""BoxFlow: the reward is lowered where a region hurt the image, and every place is compared with itself."""

from __future__ import annotations

from typing import Literal

import attrs
from attrs import validators
from torch import Tensor

from rlt2i.credit.places import PlaceAdvantage, judged_map
from rlt2i.functional.place_rewards import box_flow_rewards
from rlt2i.interfaces import CreditContext


@attrs.frozen(kw_only=True)
class BoxFlow(PlaceAdvantage):
    """R_p = R - c sigma_R W_p, normalised per place over the group (BoxFlow-GRPO, SDG, arXiv 2606.06113).

    W is where the reward's regions hurt, as far as they did; sigma_R is the spread of the group's rewards. So a good
    image can be blamed at the one place that is wrong with it. Use it with a ratio per place: ClippedSurrogate with
    ratio="location", or form="detached".

    Attributes:
        strength: c; published .5 for artefacts, .05 for places that contradict the prompt.
        signs: "hurt" is the paper; "all" also raises R where a region helped.
        min_std: floor of a place's standard deviation, in the unit of the reward.
        clip: bound on the absolute advantage.
    """

    strength: float = attrs.field(default=0.5, validator=validators.gt(0))
    signs: Literal["hurt", "all"] = attrs.field(default="hurt", validator=validators.in_(("hurt", "all")))

    def advantage(self, context: CreditContext) -> Tensor:
        rewards, size = context.rewards, context.group_size
        judged = judged_map(context, who="BoxFlow")
        if self.signs == "hurt":
            judged = judged.clamp(max=0)
        places = box_flow_rewards(rewards.final, judged, size, strength=self.strength, valid=rewards.valid)
        return self.compared(places, context)
