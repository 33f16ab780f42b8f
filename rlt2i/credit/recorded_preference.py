"""Recorded preference: what somebody said of two images, in place of what a reward says."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.captures import PREFERENCE
from rlt2i.credit.algebra import Advantage
from rlt2i.functional.advantages import recorded_preference
from rlt2i.interfaces import CreditContext, Needs


@attrs.frozen(kw_only=True)
class RecordedPreference(Advantage):
    """A = +1 for the winner of a recorded pair and -1 for its loser, as Diffusion-DPO (arXiv 2311.12908) reads them.

    The verdict comes with the images, through a sampler that reads pairs (`Recorded`). The reward of the recipe decides
    nothing then: it scores held-out images and shows in the log what it thinks of the recorded ones. A rollout that it
    calls invalid still leaves the loss, and its whole pair with it.
    """

    @property
    def needs(self) -> Needs:
        return Needs(
            groups=True,
            captures={PREFERENCE},
            remedies={PREFERENCE: "Use the sampler Recorded, with a task of pairs such as PairFileTask."},
        )

    def advantage(self, context: CreditContext) -> Tensor:
        verdict = context.trajectory.captures[PREFERENCE][:, -1].float()
        advantage = recorded_preference(verdict, context.group_size, valid=context.rewards.valid)
        return advantage.view(-1, 1, 1, 1)
