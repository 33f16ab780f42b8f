"""What every reward around another reward has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
from torch import Tensor

from rlt2i.interfaces import Reward
from rlt2i.rewards.batching import configuration


@attrs.frozen(kw_only=True)
class Wrapper(Reward):
    """A reward that needs and offers what the reward inside it needs and offers.

    Its gradient is that of the reward inside as well; a wrapper that changes scores overrides `score_tensor`.

    Attributes:
        reward: the one inside.
    """

    reward: Reward

    @property
    def metadata_keys(self) -> frozenset[str]:
        return self.reward.metadata_keys

    @property
    def offers(self) -> frozenset[str]:
        return self.reward.offers

    @property
    def span(self) -> tuple[float, float] | None:
        return self.reward.span

    @property
    def scope(self) -> Literal["sample", "group"]:
        return self.reward.scope

    def networks(self) -> Mapping[str, int | None]:
        return self.reward.networks()

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.reward.score_tensor(images, prompts, metadata)

    def fingerprint(self) -> dict[str, Any]:
        return configuration(self)

    def close(self) -> None:
        self.reward.close()
