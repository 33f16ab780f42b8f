"""Chunks are decoded and judged while the next ones are rolled out: in order, bounded, with the same bits."""

from __future__ import annotations

import threading
import time
from typing import Any

import attrs
import pytest
import torch

from rlt2i.engine import Engine, decode
from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.rewards.beside import Beside
from rlt2i.rewards.combinators import WeightedSum
from rlt2i.rewards.validity import score_safely
from rlt2i.serve.client import RemoteReward
from rlt2i.types import Prompts
from tests.helpers.toy import QuadrantBrightness, ToyPolicy
from tests.helpers.toy_recipe import clipped

WAIT = 20.0
"""Seconds after which a test has failed rather than being slow."""


def test_results_come_back_in_the_order_of_the_jobs():
    second_is_done = threading.Event()

    def first() -> int:
        assert second_is_done.wait(WAIT)
        return 1

    with Beside[int](workers=2) as beside:
        beside.hand_in(first)
        beside.hand_in(lambda: second_is_done.set() or 2)
        assert beside.results() == [1, 2]


def test_no_more_is_handed_in_than_may_wait():
    go, handed_in = threading.Event(), []
    with Beside[None](ahead=2) as beside:

        def hand_in_five() -> None:
            for number in range(5):
                beside.hand_in(lambda: None if go.wait(WAIT) else pytest.fail("never told to go"))
                handed_in.append(number)

        other = threading.Thread(target=hand_in_five, daemon=True)
        other.start()
        deadline = time.monotonic() + WAIT
        while len(handed_in) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert handed_in == [0, 1, 2]  # one at work, two waiting
        go.set()
        other.join(WAIT)
        assert handed_in == [0, 1, 2, 3, 4]
        assert beside.results() == [None] * 5


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
def test_the_first_error_is_raised_and_nothing_more_begins(error):
    begun: list[int] = []

    def job(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise error

    def hand_in_three(beside: Beside[None]) -> None:
        for number in range(3):
            beside.hand_in(lambda number=number: job(number))
        beside.results()

    with Beside[None](ahead=4) as beside:
        with pytest.raises(type(error)) as caught:
            hand_in_three(beside)
        with pytest.raises(type(error)):
            beside.hand_in(lambda: job(9))
    assert caught.value is error
    assert begun == [0]


def test_threads_end_with_the_block():
    with Beside[int](workers=3) as beside:
        for number in range(3):
            beside.hand_in(lambda number=number: number)
        assert beside.results() == [0, 1, 2]
        working = [t for t in threading.enumerate() if t.name == "beside the rollout"]
    for thread in working:
        thread.join(WAIT)
        assert not thread.is_alive()


# ------------------------------------------------------------------------------------------------------------- engine

PROMPTS = Prompts(
    texts=("a", "b", "c"), group_size=4, metadata=({}, {}, {}), core=((), (), ()), draws=(0, 1, 2)
)  # fmt: skip


def engine(reward: Any, *, chunk: int) -> Engine:
    recipe = attrs.evolve(clipped(), reward=reward)
    return Engine(algorithm=recipe.algorithm().load("cpu"), image_size=8, rollout_batch_size=chunk, seed=0)


@attrs.frozen(kw_only=True)
class WaitsForTheNextChunk(QuadrantBrightness):
    """Answers for the first chunk once the second one is being rolled out; only overlap can satisfy it."""

    rolling: threading.Event = attrs.field(factory=threading.Event)
    sizes: list[int] = attrs.field(factory=list)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        self.sizes.append(len(batch.prompts))
        assert self.rolling.wait(WAIT), "the next chunk did not begin"
        return super().score(batch, want)


def test_a_chunk_is_judged_while_the_next_is_rolled_out(monkeypatch):
    reward, calls, plain = WaitsForTheNextChunk(), [], ToyPolicy.velocity

    def velocity(self, latents, sigma, conditioning):
        calls.append(len(latents))
        if len(calls) > 5:  # five steps a chunk
            reward.rolling.set()
        return plain(self, latents, sigma, conditioning)

    monkeypatch.setattr(ToyPolicy, "velocity", velocity)
    collected = engine(reward, chunk=4).collect(PROMPTS, iteration=0)
    assert reward.sizes == [4, 4, 4]
    assert collected.experience.rewards.valid.all()


def test_images_and_scores_are_those_of_one_piece():
    whole, pieces = (engine(QuadrantBrightness(), chunk=n).collect(PROMPTS, iteration=0) for n in (12, 5))
    assert torch.equal(whole.images, pieces.images)
    assert torch.equal(whole.experience.rewards.values, pieces.experience.rewards.values)
    images = decode(ToyPolicy(), pieces.experience.trajectory.clean_latents, rollout_batch_size=12)
    assert torch.equal(pieces.images, images)
    batch = RewardBatch.of(images, PROMPTS)
    assert torch.equal(pieces.scores.scores, score_safely(QuadrantBrightness(), batch).scores)


@attrs.frozen(kw_only=True)
class ComparesGroups(QuadrantBrightness):
    """Refuses a group that is not whole."""

    scope = "group"
    groups: list[list[int]] = attrs.field(factory=list)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        assert batch.groups is not None
        self.groups.append(batch.groups.tolist())
        return super().score(batch, want)


def test_a_reward_that_compares_a_group_is_shown_whole_groups():
    reward = ComparesGroups()
    engine(reward, chunk=3).collect(PROMPTS, iteration=0)
    assert reward.groups == [[0] * 4 + [1] * 4 + [2] * 4]  # chunks of 3 meet the ends of groups at 12 only
    reward.groups.clear()
    engine(reward, chunk=2).collect(PROMPTS, iteration=0)
    assert reward.groups == [[0] * 4, [1] * 4, [2] * 4]


@attrs.frozen(kw_only=True)
class Breaks(QuadrantBrightness):
    """Needs a package that is not there, from the second chunk on."""

    calls: list[int] = attrs.field(factory=list)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        self.calls.append(1)
        if len(self.calls) > 1:
            raise ImportError("no module named judge")
        return super().score(batch, want)


def test_an_error_that_ends_the_run_ends_it_from_a_thread_too():
    with pytest.raises(ImportError, match="judge"):
        engine(Breaks(), chunk=4).collect(PROMPTS, iteration=0)


def test_an_image_that_is_not_finite_ends_the_run(monkeypatch):
    monkeypatch.setattr(ToyPolicy, "decode", lambda self, latents: latents * torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        engine(QuadrantBrightness(), chunk=4).collect(PROMPTS, iteration=0)


def test_several_requests_are_in_flight_where_every_reward_allows_it():
    remote = RemoteReward(urls=("http://127.0.0.1:1",))
    assert (remote.concurrency, QuadrantBrightness().concurrency) == (4, 1)
    mixed = WeightedSum(rewards={"a": (remote, 1.0), "b": (QuadrantBrightness(), 1.0)})
    assert mixed.concurrency == 1
