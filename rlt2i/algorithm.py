"""An algorithm is five parts that fit."""

from __future__ import annotations

import attrs
import torch

from rlt2i.captures import ATTENTION_AUTO, EDGES, PREFERENCE
from rlt2i.interfaces import CreditAssigner, Objective, Policy, PolicySpec, Reward, Sampler


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
        self._check_objective()

    def load(self, device: torch.device | str = "cpu") -> Algorithm:
        """The same algorithm with its weights read."""
        return attrs.evolve(self, policy=self.policy.load(device)) if isinstance(self.policy, PolicySpec) else self

    @property
    def captures(self) -> frozenset[str]:
        """What rollouts must record."""
        return frozenset(n for n in self.credit.needs if not n.startswith("reward/") and n not in ("groups", "noise"))

    @property
    def reward_wants(self) -> frozenset[str]:
        """What `Reward.score` must return besides scores."""
        return self._of_reward(self.credit.needs) - {"gradient"}

    @staticmethod
    def _of_reward(needs: frozenset[str]) -> frozenset[str]:
        return frozenset(n.removeprefix("reward/") for n in needs if n.startswith("reward/"))

    def _check_captures(self) -> None:
        offered = self.policy.offers | self.sampler.offers
        missing = sorted(self.captures - offered - {ATTENTION_AUTO})
        if missing:
            sample = ", ".join(sorted(offered)[:8])
            ways_out = {
                PREFERENCE: "Use the sampler Recorded, with a task of pairs such as PairFileTask.",
                EDGES: "Use a sampler whose rollouts branch, TreeSDE(...) or BranchSDE(...), or another advantage.",
            }
            way_out = ways_out.get(missing[0], "Change the credit's blocks or direction, or the policy.")
            raise ValueError(
                f"{self.credit.names(missing[0])} needs the captures {missing}, which neither "
                f"{type(self.policy).__name__} nor "
                f"{type(self.sampler).__name__} offers. They offer {sample}, ... {way_out}"
            )

        if ATTENTION_AUTO in self.captures and "maps" not in self.reward.offers:
            raise ValueError(
                "blocks='auto' compares attention with the regions that the reward judged, and "
                f"{type(self.reward).__name__} "
                "knows none. Name the blocks ('middle' is the choice for large models)."
            )

    def _check_reward(self) -> None:
        parts = (
            ("credit", self.credit.needs, lambda name: self.credit.names(f"reward/{name}")),
            ("objective", self.objective.requires, lambda name: type(self.objective).__name__),
        )
        for kind, needs, who in parts:
            missing = sorted(self._of_reward(needs) - self.reward.offers)
            if not missing:
                continue
            raise ValueError(
                f"{who(missing[0])} needs {missing} from the reward, but {type(self.reward).__name__} "
                "offers "
                f"{sorted(self.reward.offers) or 'only scores'}. Use a reward that offers it, or another "
                f"{kind}."
            )

    def _check_noise(self) -> None:
        if "noise" in self.credit.needs and not self.sampler.stochastic_steps(0):
            raise ValueError(
                f"{self.credit.names('noise')} looks at the noise of single steps, but {type(self.sampler).__name__} "
                "is deterministic. Use a stochastic sampler such as SDE(...), or a credit that does not need noise."
            )

    def _check_objective(self) -> None:
        if "log_probs" in self.objective.requires and not self.sampler.stochastic_steps(0):
            raise ValueError(
                f"{type(self.objective).__name__} needs log-probabilities, but {type(self.sampler).__name__} is "
                "deterministic. "
                "Use a stochastic sampler such as SDE(...), or a forward-process objective such as DiffusionNFT()."
            )
        self.objective.trained_steps(self.sampler)

    def check_group_size(self, group_size: int) -> None:
        """Refuse groups that cannot be compared.

        Raises:
            ValueError: when the parts compare rollouts of one prompt and there is only one, or when the sampler
                cannot make such a group.
        """
        self.sampler.check_group_size(group_size)
        needs = self.credit.needs if self.objective.uses_advantage else self.credit.weight_needs
        comparing = "groups" in needs or "groups" in self.objective.requires or self.reward.scope == "group"
        if comparing and group_size < 2:
            raise ValueError(
                f"group_size={group_size}: {type(self.credit).__name__} compares the rollouts of one prompt, and a "
                "group of "
                "one has no spread: every advantage would be 0. Use group_size >= 2 (8 to 24 work well)."
            )
