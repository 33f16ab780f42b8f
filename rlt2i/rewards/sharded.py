"""One reward on several devices, processes or machines: every replica scores its share of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import merge, split_rows, take_batch
from rlt2i.rewards.validity import score_safely
from rlt2i.rewards.wrapper import Wrapper


@attrs.frozen(kw_only=True)
class OnDevice(Wrapper):
    """Another reward on a device of its own choice: model rewards run where the images are, so these are moved.

    Attributes:
        device: "cpu", "cuda:1", ...
    """

    device: str = attrs.field()

    @device.validator
    def _check_device(self, _: Any, value: str) -> None:
        try:
            torch.device(value)
        except RuntimeError:
            raise ValueError(f"OnDevice(device={value!r}): no device. Write for example cpu or cuda:1.") from None

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        return self.reward.score(attrs.evolve(batch, images=batch.images.to(self.device)), want)

    def networks(self) -> Mapping[str, int | None]:
        """Those of the reward inside where they are on the first device of a process, which is the policy's."""
        return self.reward.networks() if self.device in ("cuda", "cuda:0") else {}

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return self.reward.score_tensor(images.to(self.device), prompts, metadata).to(images.device)

    def fingerprint(self) -> dict[str, Any]:
        """That of the reward inside: where it runs decides no score."""
        return self.reward.fingerprint()


@attrs.frozen(kw_only=True)
class Sharded(Reward):
    """Replicas of one reward, each of which scores a share of every batch, all at the same time.

    Shares are as equal as they can be and keep the order; groups stay together where scores compare them. Every
    replica is behind `scored`: one that fails makes its own share invalid and no other. Nothing is tried again
    elsewhere; `RemoteReward` with several `urls` does that.

    Attributes:
        replicas: of one reward: the same class and settings, `OnDevice` of each device or `RemoteReward` of each
            server. They must agree in their fingerprints.
    """

    replicas: tuple[Reward, ...] = attrs.field(validator=validators.min_len(1))
    _agreed: list[dict[str, Any]] = attrs.field(init=False, factory=list, eq=False, repr=False)

    @property
    def metadata_keys(self) -> frozenset[str]:
        return self._first.metadata_keys

    @property
    def offers(self) -> frozenset[str]:
        return self._first.offers - {"gradient"}

    @property
    def span(self) -> tuple[float, float] | None:
        return self._first.span

    @property
    def scope(self) -> Literal["sample", "group"]:
        return self._first.scope

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        share = -(-len(batch.prompts) // len(self.replicas))
        rows = split_rows(batch, share, scope=self.scope)

        def work(replica: Reward, own_rows: list[list[int]]) -> list[RewardOutput]:
            return [score_safely(replica, take_batch(batch, chunk), want) for chunk in own_rows]

        shares = [rows[i :: len(self.replicas)] for i in range(len(self.replicas))]
        with ThreadPoolExecutor(len(self.replicas), thread_name_prefix="shard") as threads:
            outputs = list(threads.map(work, self.replicas, shares))
        parts = [
            (chunk, out)
            for own_rows, outs in zip(shares, outputs, strict=True)
            for chunk, out in zip(own_rows, outs, strict=True)
        ]
        return merge(parts, len(batch.prompts))

    def networks(self) -> Mapping[str, int | None]:
        return {name: size for replica in self.replicas for name, size in replica.networks().items()}

    def fingerprint(self) -> dict[str, Any]:
        """That of the replicas, which decide the scores; how many there are does not."""
        self._check()
        return {"reward": "Sharded", "of": self._agreed[0]}

    def close(self) -> None:
        self._agreed.clear()
        for replica in self.replicas:
            replica.close()

    @property
    def _first(self) -> Reward:
        """Stands for all of them."""
        self._check()
        return self.replicas[0]

    def _check(self) -> None:
        """See once that all replicas score alike.

        Raises:
            ValueError: when they do not; before a training run begins, because that asks what a reward requires.
        """
        if self._agreed:
            return
        fingerprints = [_scored_by(replica.fingerprint()) for replica in self.replicas]
        for number, other in enumerate(fingerprints):
            if other != fingerprints[0]:
                raise ValueError(
                    f"Sharded: replica 0 is {fingerprints[0]} but replica {number} is {other}, so an image would score "
                    "differently in different places of a batch. Give all replicas the same settings and version."
                )
        self._agreed.append(fingerprints[0])


def _scored_by(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of what scores, here or behind servers."""
    while set(fingerprint) == {"reward", "of"}:
        fingerprint = fingerprint["of"]
    return fingerprint
