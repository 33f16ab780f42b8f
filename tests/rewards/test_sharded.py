"""Shares of a batch on several replicas: the same scores in the same order, and failures that stay where they are."""

from __future__ import annotations

import json
import threading

import attrs
import pytest
import torch

from rlt2i.config import build, to_mapping
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.recipes.parts import PARTS
from rlt2i.rewards.combinators import Affine
from rlt2i.rewards.sharded import OnDevice, Sharded
from rlt2i.rewards.validity import score_safely
from rlt2i.serve.client import RemoteReward
from tests.helpers.fake_rewards import Broken, Grey, Needy, batch_of, output_of, raises

WANT = frozenset({"maps", "regions"})


def test_shares_are_equal_and_come_back_in_order():
    replicas = tuple(Grey() for _ in range(3))
    output = Sharded(replicas=replicas).score(batch_of(*range(10, 18)), WANT)
    assert output.scores.tolist() == [float(grey) for grey in range(10, 18)]
    assert [replica.shown for replica in replicas] == [[3], [3], [2]]
    assert [row["prompt"] for row in output.info] == [f"grey {grey}" for grey in range(10, 18)]
    alone = Grey().score(batch_of(*range(10, 18)), WANT)
    assert torch.equal(output.maps, alone.maps)
    assert len(output.regions) == 8


def test_fewer_images_than_replicas():
    replicas = tuple(Grey() for _ in range(4))
    assert Sharded(replicas=replicas).score(batch_of(7)).scores.tolist() == [7.0]
    assert [replica.shown for replica in replicas] == [[1], [], [], []]


def test_replicas_work_at_the_same_time():
    together = threading.Barrier(2)

    def act(batch: RewardBatch) -> RewardOutput:
        together.wait(10)  # breaks unless the other one comes, too
        return output_of([0.5] * len(batch.prompts))

    assert Sharded(replicas=(Broken(act=act), Broken(act=act))).score(batch_of(1, 2)).valid.all()


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (raises(RuntimeError("GPU 1 fell off the bus")), "fell off the bus"),
        (lambda batch: output_of([0.5]), "1 scores for 2 images"),
        (lambda batch: output_of([float("nan")] * 2), "the score is nan"),
        (lambda batch: output_of([7.0] * 2), "outside the documented range"),
    ],
)
def test_a_replica_that_fails_spoils_its_own_share_only(act, reason):
    fine = Broken(act=lambda batch: output_of([0.25] * len(batch.prompts)))
    output = Sharded(replicas=(fine, Broken(act=act), fine)).score(batch_of(1, 2, 3, 4, 5, 6))
    assert output.valid.tolist() == [True, True, False, False, True, True]
    assert output.scores[2:4].isnan().all()
    assert reason in output.info[2]["error"]


def test_replicas_that_score_differently_are_refused_before_anything_is_scored():
    sharded = Sharded(replicas=(Affine(reward=Grey(), scale=2.0), Affine(reward=Grey(), scale=3.0)))
    with pytest.raises(ValueError, match=r"replica 0 is .*'scale': 2.0.* but replica 1 is .*'scale': 3.0"):
        _ = sharded.metadata_keys


def test_what_is_known_of_the_replicas_is_known_of_the_whole():
    sharded = Sharded(replicas=(Needy(), Needy()))
    assert sharded.metadata_keys == {"value"}
    output = score_safely(sharded, batch_of(1, 2, metadata=[{"value": 1}, {}]))
    assert output.valid.tolist() == [True, False]
    grey = Sharded(replicas=(Grey(), Grey()))
    assert (grey.span, grey.offers, grey.scope) == ((0.0, 255.0), WANT, "sample")
    assert grey.fingerprint() == {"reward": "Sharded", "of": Grey().fingerprint()}
    assert grey.fingerprint() == Sharded(replicas=(Grey(),)).fingerprint()


def test_groups_stay_together_where_scores_compare_them():
    @attrs.frozen(kw_only=True)
    class Ranked(Grey):
        scope = "group"

    replicas = (Ranked(), Ranked())
    batch = attrs.evolve(batch_of(1, 2, 3, 4, 5), groups=torch.tensor([0, 0, 1, 1, 1]))
    assert Sharded(replicas=replicas).score(batch).scores.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert sorted(size for replica in replicas for size in replica.shown) == [2, 3]


def test_servers_and_this_process_can_share(serving_grey):
    remote = RemoteReward(urls=(serving_grey,), timeout_s=5.0, patience_s=1.0)
    sharded = Sharded(replicas=(remote, Grey()))
    try:
        assert sharded.score(batch_of(1, 2, 3, 4)).scores.tolist() == [1.0, 2.0, 3.0, 4.0]
    finally:
        sharded.close()


@pytest.fixture
def serving_grey():
    pytest.importorskip("uvicorn")
    from tests.helpers.servers import serving

    with serving(Grey()) as url:
        yield url


def test_a_dead_server_spoils_its_own_share_only():
    pytest.importorskip("uvicorn")
    from tests.helpers.servers import serving

    with serving(Grey()) as alive:
        with serving(Grey()) as mortal:
            clients = [RemoteReward(urls=(url,), timeout_s=5.0, patience_s=0.3) for url in (alive, mortal)]
            sharded = Sharded(replicas=tuple(clients))
            assert sharded.score(batch_of(1, 2)).valid.all()
        output = sharded.score(batch_of(1, 2, 3, 4))
        assert output.valid.tolist() == [True, True, False, False]
        assert "gave up" in output.info[2]["error"]
        sharded.close()


def test_a_device_of_its_own(folder_of_tiny_clip):
    from rlt2i.rewards.pickscore import PickScore

    inner = PickScore(path=folder_of_tiny_clip, tokenizer="")
    batch = batch_of(10, 200)
    there = OnDevice(reward=inner, device="cpu")
    assert torch.equal(there.score(batch).scores, inner.score(batch).scores)
    assert there.fingerprint() == inner.fingerprint()
    assert Sharded(replicas=(there, inner)).score(batch).valid.all()  # a device is no other reward
    images = (batch.images.float() / 255).requires_grad_()
    there.score_tensor(images, batch.prompts, batch.metadata).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no device"):
        OnDevice(reward=inner, device="gpu one")


@pytest.mark.gpu
def test_a_model_reward_moves_to_the_gpu(folder_of_tiny_clip):
    from rlt2i.rewards.pickscore import PickScore

    inner = PickScore(path=folder_of_tiny_clip, tokenizer="")
    here, there = OnDevice(reward=inner, device="cpu"), OnDevice(reward=inner, device="cuda:0")
    batch = batch_of(10, 200, 30, 40)
    torch.testing.assert_close(
        Sharded(replicas=(here, there)).score(batch).scores, inner.score(batch).scores, atol=1e-3, rtol=1e-4
    )


@pytest.fixture(scope="module")
def folder_of_tiny_clip(tmp_path_factory):
    from tests.helpers.tiny_models import save_clip

    return str(save_clip(tmp_path_factory.mktemp("clip")))


def test_they_can_be_written_in_a_recipe():
    mapping = {
        "type": "Sharded",
        "replicas": [{"type": "OnDevice", "reward": "PickScore", "device": f"cuda:{i}"} for i in (1, 2)],
    }
    reward = build(Reward, mapping, parts=PARTS)
    assert [replica.device for replica in reward.replicas] == ["cuda:1", "cuda:2"]
    assert build(Reward, json.loads(json.dumps(to_mapping(reward, parts=PARTS))), parts=PARTS) == reward
    with pytest.raises(ValueError, match="replicas"):
        build(Reward, {"type": "Sharded", "replicas": []}, parts=PARTS)
