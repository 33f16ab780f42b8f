"""A person as a reward: training waits for votes over the images of each prompt."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from attrs import validators

from rlt2i.inputs.textfiles import user_path
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import REASON, configuration, failed, merge, split_rows, take_batch
from rlt2i.rewards.validity import score_safely
from rlt2i.voting.ballot import standings
from rlt2i.voting.booth import FAREWELL_SECONDS, Booth
from rlt2i.voting.folder import Slate, VoteFolder
from rlt2i.voting.page import ServedPage

MOST = 6
"""Images of a prompt: up to fifteen pairs, the most that anybody wants to compare."""


@attrs.define
class _Open:
    """The page of a reward, opened when the first images come."""

    booth: Booth | None = None
    page: ServedPage | None = None
    lock: threading.Lock = attrs.field(factory=threading.Lock)


@attrs.frozen(kw_only=True)
class HumanVotes(Reward):
    """How often a person prefers an image to the others of its prompt: (won + tied / 2) / compared, in [0, 1].

    `score` shows the images two by two on a page of this machine (its address is printed) and waits until every pair of
    a prompt was voted on or follows from votes: once a beats b and b beats c nobody is asked about a and c. A skipped
    pair counts for neither image. An image without any comparison is invalid: all of its pairs were skipped, or nobody
    voted for `patience_s`. Meant for groups of two to four (1, 3 or 6 pairs at most), under an objective that compares
    the images of a group, such as OnlineDPO.

    Every vote is appended to `votes.jsonl` and on the disk before the next pair is shown. A vote belongs to two images
    and their prompt, so a run that was killed and resumed asks only what was not answered. The folder also holds the
    images and `pairs.jsonl`, the same votes for offline DPO (`PairFileTask`).

    One page for one process: for training on several, serve this reward (`rlt2i serve-reward`) and name its address in
    a RemoteReward with a patience of hours.

    Attributes:
        folder: gets images, votes and pairs; several runs may share it one after the other.
        alone: judges images that come without others of their prompt, as those of evaluations do; without it they are
            invalid, so that a recipe sets `train.eval_prompts: 0`.
        patience_s: seconds without any vote after which the images that were not compared are invalid.
        undo_s: seconds after the last vote of a batch in which it can be taken back.
    """

    folder: str = "votes"
    alone: Reward | None = None
    patience_s: float = attrs.field(default=3600.0, validator=validators.gt(0))
    undo_s: float = attrs.field(default=3.0, validator=validators.ge(0))
    _state: _Open = attrs.field(init=False, factory=_Open, eq=False, repr=False)

    @property
    def metadata_keys(self) -> frozenset[str]:
        return frozenset() if self.alone is None else self.alone.metadata_keys

    @property
    def span(self) -> tuple[float, float] | None:
        return (0.0, 1.0) if self.alone is None or self.alone.span == (0.0, 1.0) else None

    @property
    def scope(self) -> Literal["sample", "group"]:
        return "group"

    @property
    def concurrency(self) -> int:
        """All chunks of a rollout wait at once, so that the next prompt can be voted on at once."""
        return 256

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        groups = split_rows(batch, 1, scope="group")
        single = [rows[0] for rows in groups if len(rows) == 1]
        parts = [(single, self._alone(take_batch(batch, single)))] if single else []
        large = [rows for rows in groups if len(rows) > MOST]
        parts += [(rows, failed(len(rows), _too_many(len(rows)))) for rows in large]
        compared = [rows for rows in groups if 1 < len(rows) <= MOST]
        if compared:
            booth = self._booth()
            slates = [
                booth.folder.keep(batch.images[rows], batch.prompts[rows[0]], batch.metadata[rows[0]])
                for rows in compared
            ]
            booth.ask(slates)
            try:
                voted = booth.wait(slates, patience_s=self.patience_s, undo_s=self.undo_s)
            finally:
                booth.withdraw(slates)
            why = "every pair of this image was skipped" if voted else f"nobody voted for {self.patience_s:g} s"
            parts += [(rows, _output(slate, booth.folder, why)) for rows, slate in zip(compared, slates, strict=True)]
        return merge(parts, len(batch.prompts))

    def _alone(self, batch: RewardBatch) -> RewardOutput:
        if self.alone is not None:
            return score_safely(self.alone, batch)
        return failed(
            len(batch.prompts),
            "an image without others of its prompt, as evaluations show them, cannot be voted on: set "
            "train.eval_prompts=0, or give HumanVotes(alone=REWARD)",
        )

    def _booth(self) -> Booth:
        with self._state.lock:
            if self._state.booth is None:
                booth = Booth(VoteFolder(Path(user_path(self.folder))))
                self._state.page = ServedPage.open(booth)
                self._state.booth = booth
                print(f"\nvote on this machine at {self._state.page.url}", file=sys.stderr, flush=True)
            return self._state.booth

    def fingerprint(self) -> dict[str, Any]:
        return configuration(self, without=("folder", "patience_s", "undo_s"))

    def close(self) -> None:
        with self._state.lock:
            if self._state.booth is not None and self._state.page is not None:
                self._state.booth.end("The run has ended. You can close this page.")
                self._state.booth.linger(FAREWELL_SECONDS)
                self._state.page.close()
                self._state.booth = self._state.page = None
        if self.alone is not None:
            self.alone.close()


def _too_many(count: int) -> str:
    return f"a group of {count} images: a person compares at most {MOST}; set train.group_size to 2, 3 or 4"


def _output(slate: Slate, folder: VoteFolder, why: str) -> RewardOutput:
    """The scores of a slate as its votes stand; images without any comparison are invalid for the reason given."""
    places = standings(slate.images, lambda one, other: folder.verdict(slate.prompt, one, other))
    scores = [standing.score for standing in places]
    return RewardOutput(
        scores=torch.tensor([torch.nan if score is None else score for score in scores]),
        valid=torch.tensor([score is not None for score in scores]),
        info=[{REASON: why} if s.score is None else {"won": s.won, "lost": s.lost, "tied": s.tied} for s in places],
    )
