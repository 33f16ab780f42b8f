"""Rollouts of a prompt that share steps and branch: trees, and branches off a deterministic trunk."""

from __future__ import annotations

from abc import abstractmethod

import attrs
from attrs import validators

from rlt2i.captures import EDGES
from rlt2i.functional.branching import Paths, tree_paths, trunk_paths
from rlt2i.interfaces import Policy, RolloutRequest
from rlt2i.samplers.rollout import denoise
from rlt2i.samplers.stochastic import StochasticSampler
from rlt2i.types import Conditioning, Trajectory

MOST_CHILDREN = 1024
"""Of one node; a group of that many images is beyond every published one."""


@attrs.frozen(kw_only=True)
class BranchingSampler(StochasticSampler):
    """What samplers share whose rollouts share steps; how they branch is for the subclass to say.

    All rollouts of a group start from the initial noise of its first, and a state that several pass through is shown to
    the network once. A branch draws from the generator of the first rollout behind it, so nothing depends on how
    groups are put together. The capture "edges" is recorded in any case: it says which rollouts take a step together.

    Attributes:
        num_steps: T.
        kernel: the transition of the noisy steps.
    """

    whole_groups = True

    @property
    def offers(self) -> frozenset[str]:
        return super().offers | {EDGES}

    @property
    @abstractmethod
    def paths(self) -> Paths:
        """Of one group."""

    def stochastic_steps(self, iteration: int) -> tuple[int, ...]:
        return tuple((self.paths.edges >= 0).any(dim=0).nonzero()[:, 0].tolist())

    @property
    def noisy_steps(self) -> int:
        return int((self.paths.edges >= 0).sum(dim=1).max())

    def check_group_size(self, group_size: int) -> None:
        leaves = len(self.paths.states)
        if group_size != leaves:
            raise ValueError(
                f"group_size={group_size}: {self} makes {leaves} rollouts of a prompt, no more and no fewer. "
                f"Use group_size={leaves}, or let it branch as often as the group needs."
            )

    def rollout(self, policy: Policy, conditioning: Conditioning, request: RolloutRequest) -> Trajectory:
        self.check_group_size(request.group_size)
        return denoise(
            policy,
            conditioning,
            kernel=self.kernel,
            stochastic_steps=self.stochastic_steps(request.iteration),
            num_steps=self.num_steps,
            request=request,
            paths=self.paths,
        )


@attrs.frozen(kw_only=True)
class TreeSDE(BranchingSampler):
    """BranchGRPO's tree (arXiv 2509.06040): at each split every node branches into `width` children.

    Between splits a node goes on with noise of its own, which all its descendants share. A group is the
    width ** len(splits) leaves of one tree. Every noisy step has the kernel's own standard deviation, in the step as in
    its log-probability; the authors scale the noise of a split by 4 and leave the log-probability as it is, which
    biases the ratio of later updates.

    Attributes:
        num_steps: T.
        kernel: the transition of the noisy steps.
        splits: steps at which nodes branch, increasing.
        width: children of a node.
        last: end of the noisy steps, exclusive; None stands for all but the last step.
    """

    splits: tuple[int, ...] = attrs.field(default=(0, 3, 6))
    width: int = attrs.field(default=2, validator=[validators.ge(2), validators.le(MOST_CHILDREN)])
    last: int | None = None

    def __attrs_post_init__(self) -> None:
        last = self._last
        if not 0 < last <= self.num_steps:
            raise ValueError(
                f"TreeSDE(last={self.last}, num_steps={self.num_steps}): the steps before last are noisy. "
                f"Use 0 < last <= {self.num_steps}."
            )
        if not self.splits or list(self.splits) != sorted({step for step in self.splits if 0 <= step < last}):
            raise ValueError(
                f"TreeSDE(splits={self.splits}): a tree branches at one noisy step or more. Use different steps from 0 "
                f"to {last - 1}, in increasing order."
            )

    @property
    def _last(self) -> int:
        return max(1, self.num_steps - 1) if self.last is None else self.last

    @property
    def paths(self) -> Paths:
        return tree_paths(self.num_steps, splits=self.splits, width=self.width, last=self._last)


@attrs.frozen(kw_only=True)
class BranchSDE(BranchingSampler):
    """TempFlow-GRPO's trajectory branching (arXiv 2508.04324): one deterministic trunk, left by one noisy step.

    At each step of [first, last) `branches` rollouts take one noisy step from the trunk and follow the ODE to the end,
    so the reward of a finished image speaks for that step alone. A group is the (last - first) branches rollouts of
    one trunk; each of them is stochastic, hence trainable, at its own step only.

    Attributes:
        num_steps: T.
        kernel: the transition of the noisy steps.
        steps: (first, last), last exclusive; None stands for all steps but the last.
        branches: rollouts that leave the trunk at one step.
    """

    steps: tuple[int, int] | None = None
    branches: int = attrs.field(default=6, validator=[validators.ge(2), validators.le(MOST_CHILDREN)])

    def __attrs_post_init__(self) -> None:
        first, last = self._steps
        if not 0 <= first < last <= self.num_steps:
            raise ValueError(
                f"BranchSDE(steps={self.steps}, num_steps={self.num_steps}): rollouts must leave the trunk somewhere. "
                f"Use 0 <= first < last <= {self.num_steps}."
            )

    @property
    def _steps(self) -> tuple[int, int]:
        return (0, max(1, self.num_steps - 1)) if self.steps is None else self.steps

    @property
    def paths(self) -> Paths:
        first, last = self._steps
        return trunk_paths(self.num_steps, first=first, last=last, branches=self.branches)
