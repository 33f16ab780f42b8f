"""An algorithm is five parts that fit."""

from __future__ import annotations

import attrs
import torch

from rlt2i.captures import NEGATIVE
from rlt2i.interfaces import CreditAssigner, Needs, Objective, Policy, PolicySpec, Reward, Sampler


@attrs.frozen(kw_only=True)
class Algorithm:
    """Policy, sampler, reward, credit and objective, checked against each other before any weight is loaded.

    Raises:
        ValueError: when the parts do not fit, saying what to change.
    """

    policy: Policy | PolicySpec
    sampler: Sampler
    reward: Reward
    credit: CreditAssigner
    objective: Objective

    def __attrs_post_init__(self) -> None:
        self._check_captures()
        self._check_reward()
        self._check_noise()
        self.objective.trained_steps(self.sampler)

    def load(self, device: torch.device | str = "cpu") -> Algorithm:
        """The same algorithm with its weights read."""
        return attrs.evolve(self, policy=self.policy.load(device)) if isinstance(self.policy, PolicySpec) else self

    @property
    def captures(self) -> frozenset[str]:
        """What rollouts record: what the credit needs, and what spares the update a pass."""
        likelihoods = self.objective.needs.noise and self.objective.rollout_weights == "online"
        return self.credit.needs.captures | ({NEGATIVE} & self.policy.offers if likelihoods else frozenset())

    @property
    def reward_wants(self) -> frozenset[str]:
        """What `Reward.score` must return besides scores."""
        return frozenset(self.credit.needs.reward) - {"gradient"}

    @property
    def _needs_by_part(self) -> tuple[tuple[str, Needs, str], ...]:
        """(name, needs, kind) of every part that has any."""
        credit = tuple((name, needs, "credit") for name, needs in self.credit.needs_by_part)
        return (*credit, (type(self.objective).__name__, self.objective.needs, "objective"))

    def _check_captures(self) -> None:
        offered = self.policy.offers | self.sampler.offers
        for name, needs, kind in self._needs_by_part:
            missing = sorted(needs.captures - offered)
            if missing:
                way_out = needs.remedies.get(missing[0], f"Use a policy or sampler that offers it, or another {kind}.")
                raise ValueError(
                    f"{name} needs the captures {missing}, which neither {type(self.policy).__name__} nor "
                    f"{type(self.sampler).__name__} offers. They offer {', '.join(sorted(offered)[:8])}, ... {way_out}"
                )

    def _check_reward(self) -> None:
        offered = self.reward.offers
        for name, needs, kind in self._needs_by_part:
            missing = sorted(needs.reward - offered)
            if missing:
                way_out = needs.remedies.get(missing[0], f"Use a reward that offers it, or another {kind}.")
                raise ValueError(
                    f"{name} needs {missing} from the reward, but {type(self.reward).__name__} offers "
                    f"{sorted(offered) or 'only scores'}. {way_out}"
                )

    def _check_noise(self) -> None:
        if self.sampler.stochastic_steps(0):
            return
        for name, needs, kind in self._needs_by_part:
            if needs.noise:
                what = "log-probabilities" if kind == "objective" else "the noise of single steps"
                default = f"Use a stochastic sampler such as SDE(...), or another {kind}."
                raise ValueError(
                    f"{name} needs {what}, but {type(self.sampler).__name__} is deterministic. "
                    f"{needs.remedies.get('noise', default)}"
                )

    def check_group_size(self, group_size: int) -> None:
        """Refuse groups that cannot be compared.

        Raises:
            ValueError: when the parts compare rollouts of one prompt and there is only one, or when the sampler
                cannot make such a group.
        """
        self.sampler.check_group_size(group_size)
        needs = self.credit.needs if self.objective.uses_advantage else self.credit.weight_needs
        comparing = needs.groups or self.objective.needs.groups or self.reward.scope == "group"
        if comparing and group_size < 2:
            raise ValueError(
                f"group_size={group_size}: {type(self.credit).__name__} compares the rollouts of one prompt, and a "
                "group of one has no spread: every advantage would be 0. Use group_size >= 2 (8 to 24 work well)."
            )
