from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch

from rlt2i.config import build, to_mapping
from rlt2i.interfaces import CODE, Reward, RewardOutput
from rlt2i.recipes.parts import PARTS
from rlt2i.rewards.batching import failed, merge, split_rows, take_batch
from rlt2i.rewards.cached import Cached
from rlt2i.rewards.combinators import Affine, Clip, Function, WeightedSum
from rlt2i.rewards.pooled import Pooled, usable_cores
from rlt2i.rewards.validity import Guarded, score_safely
from tests.helpers.fake_rewards import Bright, Broken, Dying, Grey, Needy, batch_of, mean_grey, output_of, raises

FAKES = "tests.helpers.fake_rewards"


def assert_same(one: RewardOutput, other: RewardOutput) -> None:
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(one.valid, other.valid)
    assert one.components.keys() == other.components.keys()
    for name, values in one.components.items():
        torch.testing.assert_close(values, other.components[name], rtol=0, atol=0, equal_nan=True)
    if one.maps is not None or other.maps is not None:
        assert torch.equal(one.maps, other.maps)


# -------------------------------------------------------------------------------------------------------------- sums


def test_weighted_sum_by_hand():
    total = WeightedSum(rewards={"a": (Grey(), 2.0), "b": (Affine(reward=Grey(), scale=1.0, shift=1.0), -1.0)})
    output = total.score(batch_of(10, 20))
    # 2 * 10 - 11 and 2 * 20 - 21
    assert output.scores.tolist() == [9.0, 19.0]
    assert output.components["a"].tolist() == [10.0, 20.0]
    assert output.components["b"].tolist() == [11.0, 21.0]
    assert output.components["a/half"].tolist() == [5.0, 10.0]
    assert output.components["b/raw"].tolist() == [10.0, 20.0]
    assert total.span == (0.0 - 256.0, 510.0 - 1.0)


def test_a_sum_is_valid_where_all_of_its_rewards_are():
    nan_first = Broken(act=lambda batch: output_of([math.nan, 0.5]))
    output = WeightedSum(rewards={"grey": (Grey(), 1.0), "odd": (nan_first, 1.0)}).score(batch_of(1, 2))
    assert output.valid.tolist() == [False, True]
    assert math.isnan(output.scores[0])
    assert output.scores[1] == 2.5
    assert output.components["grey"].tolist() == [1.0, 2.0]
    assert output.info[0]["error"].startswith("odd: the score is nan")
    assert "error" not in output.info[1]


def test_a_raising_reward_in_a_sum_never_becomes_zero():
    total = WeightedSum(rewards={"grey": (Grey(), 1.0), "odd": (Broken(act=raises(RuntimeError("no GPU"))), 0.1)})
    output = total.score(batch_of(1, 2))
    assert not output.valid.any()
    assert output.scores.isnan().all()
    assert "no GPU" in output.info[0]["error"]


def test_sums_know_what_their_rewards_need_and_where_to_look():
    total = WeightedSum(rewards={"grey": (Grey(), 2.0), "needy": (Needy(), 1.0)})
    assert total.metadata_keys == {"value"}
    assert total.offers == {"maps", "regions"}
    assert total.span is None
    batch = batch_of(3, metadata=[{"value": 1}])
    output = total.score(batch, frozenset({"maps", "regions"}))
    assert output.maps.tolist() == [[[6.0, 6.0], [6.0, 6.0]]]
    assert [region.credit for region in output.regions[0]] == [2.0]


@pytest.mark.parametrize("rewards", [{}, {"a": (Grey(), 0.0)}, {"a": (Grey(), math.nan)}])
def test_a_sum_of_nothing_is_refused(rewards):
    with pytest.raises(ValueError, match="WeightedSum"):
        WeightedSum(rewards=rewards)


# ------------------------------------------------------------------------------------------------------------- scales


def test_affine_by_hand():
    affine = Affine(reward=Grey(), scale=-0.5, shift=1.0)
    output = affine.score(batch_of(4), frozenset({"regions"}))
    assert output.scores.tolist() == [-1.0]
    assert output.components["raw"].tolist() == [4.0]
    assert output.regions[0][0].credit == -1.0
    assert affine.span == (-126.5, 1.0)


def test_clip_by_hand():
    clip = Clip(reward=Grey(), low=5.0, high=10.0)
    assert clip.score(batch_of(1, 7, 99)).scores.tolist() == [5.0, 7.0, 10.0]
    assert clip.span == (5.0, 10.0)
    assert Clip(reward=Grey(), low=-5.0, high=10.0).span == (0.0, 10.0)
    assert Clip(reward=Needy(), low=-5.0, high=10.0).span == (-5.0, 10.0)


def test_clip_does_not_turn_nan_into_a_score():
    output = Guarded(reward=Clip(reward=Broken(act=lambda b: output_of([math.nan])), low=0.0, high=1.0)).score(
        batch_of(1)
    )
    assert not output.valid.any()


def test_senseless_scales_are_refused():
    with pytest.raises(ValueError, match="scale=0"):
        Affine(reward=Grey(), scale=0.0)
    with pytest.raises(ValueError, match="low < high"):
        Clip(reward=Grey(), low=1.0, high=1.0)


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("reward", "slope"),
    [
        (Affine(reward=Bright(), scale=-3.0, shift=1.0), -3.0),
        (Clip(reward=Bright(), low=0.0, high=1.0), 1.0),
        (Clip(reward=Bright(), low=0.0, high=0.1), 0.0),
        (WeightedSum(rewards={"a": (Bright(), 2.0), "b": (Affine(reward=Bright(), scale=0.5), 4.0)}), 4.0),
        (Guarded(reward=Bright()), 1.0),
        (Cached(reward=Bright()), 1.0),
        (Pooled(reward=Bright()), 1.0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Reward) else "",
)
def test_gradients_pass_through(reward: Reward, slope: float):
    assert "gradient" in reward.offers
    batch = batch_of(51, 102)
    images = (batch.images.float() / 255).requires_grad_()
    scores = reward.score_tensor(images, batch.prompts, batch.metadata)
    torch.testing.assert_close(scores.detach(), reward.score(batch).scores)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, slope / 48))  # 3 x 4 x 4 pixels a mean


def test_a_sum_has_a_gradient_only_where_all_of_its_rewards_have_one():
    mixed = WeightedSum(rewards={"grey": (Grey(), 1.0), "bright": (Bright(), 1.0)})
    assert mixed.offers == {"maps", "regions"}
    with pytest.raises(ValueError, match="Grey has no gradient"):
        mixed.score_tensor(torch.zeros(1, 3, 4, 4), ["x"], [{}])
    assert "gradient" not in Affine(reward=Grey(), scale=2.0).offers


# ---------------------------------------------------------------------------------------------------------- functions


def test_a_plain_function_is_a_reward():
    output = Function(function=f"{FAKES}:mean_grey").score(batch_of(7, 0))
    assert output.scores[0] == 7.0
    assert output.valid.tolist() == [True, False]


def test_a_function_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def score(images, prompts, metadata):\n    return [len(p) for p in prompts]\n", encoding="utf-8")
    reward = Function(function=f"{path}:score", metadata_keys=["value"])
    assert reward.score(batch_of(1, 100)).scores.tolist() == [6.0, 8.0]
    assert reward.metadata_keys == {"value"}
    assert len(reward.fingerprint()["source"]) == 64


def test_in_python_a_function_stands_for_itself():
    reward = Function(function=mean_grey, span=(0.0, 255.0))
    assert reward == Function(function=f"{FAKES}:mean_grey", span=(0.0, 255.0))
    assert reward.score(batch_of(7, 9)).scores.tolist() == [7.0, 9.0]
    assert build(Reward, to_mapping(reward, parts=PARTS), parts=PARTS) == reward
    for nameless in (lambda images, prompts, metadata: [0.0], raises(ValueError())):
        with pytest.raises(ValueError, match="Define it with `def` at the top of a module"):
            Function(function=nameless)


def test_a_function_of_a_script_is_named_by_its_file(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from rlt2i.rewards.combinators import Function\n"
        "def red(images, prompts, metadata):\n    return images[:, 0].float().mean(dim=(1, 2))\n"
        "if __name__ == '__main__':\n    print(Function(function=red).function)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == f"{script}:red", done.stderr
    assert Function(function=done.stdout.strip()).score(batch_of(5)).scores.tolist() == [5.0]


def test_a_function_that_returns_too_few_scores_fails_aloud():
    reward = Function(function=f"{FAKES}:one_too_few")
    with pytest.raises(ValueError, match="one number per image"):
        reward.score(batch_of(1, 2))
    output = score_safely(reward, batch_of(1, 2))
    assert not output.valid.any()
    assert "one number per image" in output.info[0]["error"]


def test_a_function_that_does_not_exist_is_refused_at_once():
    with pytest.raises(ValueError, match="did you mean 'mean_grey'"):
        Function(function=f"{FAKES}:mean_gray")
    with pytest.raises(ValueError, match="not a function"):
        Function(function=f"{FAKES}:__name__")


# ------------------------------------------------------------------------------------------------------------- caches


def test_a_cache_asks_once_per_image_and_prompt():
    inner = Grey()
    cached = Cached(reward=inner)
    first = cached.score(batch_of(1, 2, 1), frozenset({"maps"}))
    assert inner.shown == [2]
    again = cached.score(batch_of(2, 1, 3), frozenset({"maps"}))
    assert inner.shown == [2, 1]
    assert_same(first, Grey().score(batch_of(1, 2, 1), frozenset({"maps"})))
    assert_same(again, Grey().score(batch_of(2, 1, 3), frozenset({"maps"})))
    assert [row["prompt"] for row in again.info] == ["grey 2", "grey 1", "grey 3"]


def test_a_cache_tells_apart_what_could_score_differently():
    inner = Grey()
    cached = Cached(reward=inner)
    batch = batch_of(1)
    variants = [
        batch,
        attrs.evolve(batch, prompts=["other"]),
        attrs.evolve(batch, metadata=[{"text": "x"}]),
        attrs.evolve(batch, images=batch.images.flip(-1) + 1),
        attrs.evolve(batch, images=batch.images.view(1, 3, 2, 8)),
    ]
    for variant in variants:
        cached.score(variant)
    cached.score(batch, frozenset({"regions"}))
    assert inner.shown == [1] * 6
    for variant in variants:
        cached.score(variant)
    assert inner.shown == [1] * 6


def test_a_cache_forgets_the_oldest():
    inner = Grey()
    cached = Cached(reward=inner, size=2)
    for grey in (1, 2, 1, 3, 1, 2):
        cached.score(batch_of(grey))
    assert inner.shown == [1, 1, 1, 1]  # 1, 2, 3, and 2 again: it was the least recently used when 3 came


def test_a_cache_does_not_remember_failures():
    answers = [failed(1, "busy"), output_of([0.5])]
    cached = Cached(reward=Broken(act=lambda batch: answers.pop(0)))
    assert not cached.score(batch_of(1)).valid.any()
    assert cached.score(batch_of(1)).scores.tolist() == [0.5]
    assert cached.score(batch_of(1)).scores.tolist() == [0.5]


def test_group_rewards_cannot_be_cached():
    @attrs.frozen
    class Ranked(Grey):
        scope = "group"

    with pytest.raises(ValueError, match="compare the images of a group"):
        Cached(reward=Ranked())


# -------------------------------------------------------------------------------------------------------------- pools


def test_threads_change_nothing_but_speed():
    batch = batch_of(*range(20))
    want = frozenset({"maps", "regions"})
    inner = Grey()
    pooled = Pooled(reward=inner, workers=3, chunk=3).score(batch, want)
    assert_same(pooled, Grey().score(batch, want))
    assert sorted(inner.shown) == [2, 3, 3, 3, 3, 3, 3]
    assert len(pooled.regions) == 20


def test_a_failing_chunk_leaves_the_others_their_scores():
    def act(batch):
        if int(batch.images.max()) == 9:
            raise RuntimeError("bad chunk")
        return output_of(batch.images.float().mean(dim=(1, 2, 3)) / 255)

    output = Pooled(reward=Broken(act=act), workers=2, chunk=2).score(batch_of(1, 2, 9, 4, 5, 6))
    assert output.valid.tolist() == [True, True, False, False, True, True]
    assert "bad chunk" in output.info[3]["error"]


@pytest.mark.slow
def test_processes_give_the_same_and_survive_a_death():
    batch, want = batch_of(*range(6)), frozenset({"maps", "regions"})
    pooled = Pooled(reward=Affine(reward=Grey(), scale=0.5), workers=1, kind="process", chunk=4)
    try:
        assert_same(pooled.score(batch, want), Affine(reward=Grey(), scale=0.5).score(batch, want))
        assert pooled.score(batch, want).regions[0][0].mask.tolist() == [[True, False]]
    finally:
        pooled.close()
    dying = Pooled(reward=Dying(), workers=1, kind="process", chunk=1)
    try:
        output = dying.score(batch_of(255))
        assert not output.valid.any()
        assert dying.score(batch_of(7)).scores.tolist() == [7.0]
    finally:
        dying.close()


def test_usable_cores_are_shared_between_ranks(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cores = usable_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    assert usable_cores() == 1


def test_groups_stay_together_where_scores_need_it():
    batch = attrs.evolve(batch_of(1, 2, 3, 4, 5), groups=torch.tensor([0, 0, 0, 1, 1]))
    assert split_rows(batch, 2) == [[0, 1], [2, 3], [4]]
    assert split_rows(batch, 2, scope="group") == [[0, 1, 2], [3, 4]]
    assert split_rows(batch, 5, scope="group") == [[0, 1, 2, 3, 4]]


def test_merge_puts_rows_back_and_misses_none():
    batch = batch_of(1, 2, 3)
    whole = merge([([2, 0], Grey().score(take_batch(batch, [2, 0])))], 3)
    assert whole.scores[[0, 2]].tolist() == [1.0, 3.0]
    assert whole.valid.tolist() == [True, False, True]
    assert "not scored" in whole.info[1]["error"]


# ------------------------------------------------------------------------------------------------------------ recipes


def test_combinators_can_be_written_in_a_recipe():
    mapping = {
        "type": "WeightedSum",
        "rewards": {
            "size": [{"type": "Affine", "reward": "JPEGCompressibility", "scale": 0.002}, 1],
            "text": [{"type": "Cached", "reward": {"type": "OCRReward", "match": "partial"}}, 0.5],
            "mine": [{"type": "Function", "function": f"{FAKES}:mean_grey", "span": [0, 255]}, 0.1],
            "pool": [{"type": "Pooled", "reward": {"type": "Clip", "reward": "OCRReward", "low": 0, "high": 1}}, 1],
        },
    }
    reward = build(Reward, mapping, parts=PARTS)
    assert build(Reward, json.loads(json.dumps(to_mapping(reward, parts=PARTS))), parts=PARTS) == reward
    assert reward.rewards["text"][0].reward.match == "partial"


def test_fingerprints_hold_what_decides_the_scores():
    settings = {"reward": {"reward": "Grey", "version": 1}, "scale": 2.0, "shift": 0.0}
    affine = {"reward": "Affine", "settings": settings, "code": CODE}
    pool = Pooled(reward=Affine(reward=Grey(), scale=2.0), workers=7)
    assert pool.fingerprint() == {"reward": "Pooled", "settings": {"reward": affine}, "code": CODE}
    assert json.loads(json.dumps(pool.fingerprint())) == pool.fingerprint()
