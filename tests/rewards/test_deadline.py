"""A reward that hangs costs its batch, and in the end the run, but not the night."""

from __future__ import annotations

import threading
import time

import attrs
import pytest
import torch

from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.rewards.deadline import Deadline
from rlt2i.rewards.validity import score_safely
from rlt2i.training.start import train
from rlt2i.training.trainer import RunStopped
from tests.helpers import toy_recipe
from tests.helpers.toy import QuadrantBrightness

BATCH = RewardBatch(images=torch.zeros(2, 3, 8, 8, dtype=torch.uint8), prompts=["a", "b"], metadata=[{}, {}])


@attrs.frozen(kw_only=True)
class Hanging(QuadrantBrightness):
    """Waits for `go` where it is told to; says in which gradient mode it was called."""

    go: threading.Event = attrs.field(factory=threading.Event, init=False, eq=False)
    hangs: list[bool] = attrs.field(factory=lambda: [True], init=False, eq=False)
    modes: list[bool] = attrs.field(factory=list, init=False, eq=False)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        self.modes.append(torch.is_grad_enabled())
        if self.hangs[0]:
            self.go.wait(60)
        return super().score(batch, want)


def test_an_answer_in_time_is_the_answer():
    reward = Hanging()
    reward.hangs[0] = False
    with torch.no_grad():
        found = Deadline(reward=reward, seconds=60).score(BATCH)
    assert torch.equal(found.scores, reward.score(BATCH).scores)
    assert reward.modes == [False, True]  # a thread of its own has the caller's gradient mode
    assert Deadline(reward=reward, seconds=60).fingerprint() == reward.fingerprint()


def test_a_late_answer_is_invalid_and_the_reward_is_not_called_again_before_it_has_ended():
    reward = Hanging()
    limited = Deadline(reward=reward, seconds=0.05)
    start = time.monotonic()
    for why in ("no answer within 0.05 s", "an earlier call still hangs"):
        found = score_safely(limited, BATCH)
        assert not found.valid.any()
        assert found.scores.isnan().all()
        assert found.info is not None
        assert why in found.info[0]["error"]
    assert time.monotonic() - start < 10
    assert len(reward.modes) == 1
    reward.hangs[0] = False
    reward.go.set()
    assert attrs.evolve(limited, seconds=60).score(BATCH).valid.all()
    limited_again = Deadline(reward=reward, seconds=60)
    assert limited_again.score(BATCH).valid.all()


def test_its_errors_are_those_of_the_reward():
    @attrs.frozen(kw_only=True)
    class Fails(QuadrantBrightness):
        def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
            raise ModuleNotFoundError("No module named 'judge'", name="judge")

    with pytest.raises(ModuleNotFoundError, match="judge"):
        Deadline(reward=Fails(), seconds=60).score(BATCH)


def test_a_run_whose_reward_hangs_ends_with_the_reason(tmp_path):
    recipe = attrs.evolve(toy_recipe.clipped(eval_prompts=0), reward=Deadline(reward=Hanging(), seconds=0.05))
    with pytest.raises(RunStopped, match=r"iteration 1: 100%.*no answer within 0\.05 s"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), 1e300])
def test_impossible_deadlines_are_refused(seconds):
    with pytest.raises(ValueError, match="seconds"):
        Deadline(reward=QuadrantBrightness(), seconds=seconds)
