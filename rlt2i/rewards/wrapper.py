"""What every reward around another reward has in common."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from rlt2i.interfaces import Reward
from rlt2i.rewards.batching import configuration


@attrs.frozen(kw_only=True)
class Wrapper(Reward):
    """A reward that needs and offers what the reward inside it needs and offers.

    Attributes:
        reward: the one inside.
    """

    reward: Reward

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        return self.reward.requires

    @property
    def offers(self) -> frozenset[str]:  # type: ignore[override]
        return self.reward.offers

    @property
    def span(self) -> tuple[float, float] | None:  # type: ignore[override]
        return self.reward.span

    @property
    def scope(self) -> Literal["sample", "group"]:  # type: ignore[override]
        return self.reward.scope

    def fingerprint(self) -> dict[str, Any]:
        return configuration(self)

    def close(self) -> None:
        self.reward.close()
