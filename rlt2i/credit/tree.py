"""Tree advantage: a step is worth what comes of it, compared with the other steps that were taken at the same time."""

from __future__ import annotations

import attrs
from torch import Tensor

from rlt2i.captures import EDGES
from rlt2i.credit.algebra import StandardisedAdvantage
from rlt2i.functional.branching import distinct_edges, edge_advantage
from rlt2i.interfaces import CreditContext, Needs


@attrs.frozen(kw_only=True)
class TreeAdvantage(StandardisedAdvantage):
    """The mean reward of the leaves below each step, normalised over the different steps of its group and depth.

    With a tree (`TreeSDE`) this is BranchGRPO's advantage per depth (arXiv 2509.06040), with branches off a trunk
    (`BranchSDE`) TempFlow-GRPO's per prompt and step (arXiv 2508.04324). A step that several rollouts share is one
    sample: it counts once, in the statistics and in the loss. Invalid leaves leave the means of the steps above them; a
    step without any valid leaf gets 0.

    Attributes:
        clip: bound on the absolute advantage.
        eps: added to the standard deviation.
    """

    @property
    def needs(self) -> Needs:
        return Needs(
            groups=True,
            captures={EDGES},
            remedies={
                EDGES: "Use a sampler whose rollouts branch, TreeSDE(...) or BranchSDE(...), or another advantage."
            },
        )

    def advantage(self, context: CreditContext) -> Tensor:
        rewards, edges = context.rewards, context.trajectory.captures[EDGES]
        advantage = edge_advantage(rewards.final, edges, context.group_size, eps=self.eps, valid=rewards.valid)
        return self.bounded(advantage)[:, :, None, None]

    def mask(self, context: CreditContext) -> Tensor:
        edges = context.trajectory.captures[EDGES]
        distinct = distinct_edges(edges, context.group_size, valid=context.rewards.valid)
        return (distinct | (edges < 0))[:, :, None, None]
