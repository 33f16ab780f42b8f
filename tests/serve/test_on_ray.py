"""A reward in actors of a Ray cluster on this machine: the same scores, and the faults of `RemoteReward`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import torch

from rlt2i.interfaces import RewardBatch
from rlt2i.serve.on_ray import RayReward, RayRewardError
from tests.helpers.ray_recipes import MARK, Brightness, CannotBeBuilt, mark
from tests.helpers.toy import QuadrantBrightness

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="needs Ray: pip install 'rlt2i[ray]'")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One on this machine, whose actors remember accidents in a file of this folder."""
    folder = tmp_path_factory.mktemp("ray")
    variables = {"PYTHONPATH": str(ROOT), MARK: mark(folder), "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables}
    )
    yield folder
    ray.shutdown()


@pytest.fixture(autouse=True)
def no_accident_yet(cluster: Path) -> None:
    Path(mark(cluster)).unlink(missing_ok=True)


def a_batch(count: int = 5) -> RewardBatch:
    images = torch.arange(count * 3 * 64, dtype=torch.int64).view(count, 3, 8, 8).remainder(251).to(torch.uint8)
    return RewardBatch(images=images, prompts=["a"] * count, metadata=[{} for _ in range(count)])


def actors(reward: Brightness | QuadrantBrightness, **options: object) -> RayReward:
    return RayReward(**{"reward": reward, "cpus": 0, "chunk": 2, "timeout_s": 60.0} | options)  # type: ignore[arg-type]


def test_a_cluster_without_room_is_named():
    reward = actors(Brightness(), cpus=64, patience_s=1.0)
    assert "replica 0: it did not start in time; are 64 CPUs" in reward.score(a_batch(1)).info[0]["error"]


@pytest.mark.parametrize("replicas", [1, 2])
def test_scores_are_those_of_the_reward_itself(replicas):
    inside, batch = QuadrantBrightness(), a_batch()
    expected = inside.score(batch, frozenset({"maps"}))
    found = actors(inside, replicas=replicas).score(batch, frozenset({"maps"}))
    assert torch.equal(found.scores, expected.scores)
    assert bool(found.valid.all())
    assert torch.equal(found.maps, expected.maps)
    assert torch.equal(found.components["strict"], expected.components["strict"])


def test_what_it_is_does_not_depend_on_where_it_runs():
    one, two = actors(Brightness()), actors(Brightness(), replicas=2, chunk=7)
    assert one.fingerprint() == two.fingerprint()
    assert actors(QuadrantBrightness()).offers == {"maps", "regions"}


def test_a_chunk_whose_actor_died_is_scored_by_a_new_one(cluster):
    found = actors(Brightness(accident="dies")).score(a_batch())
    assert Path(mark(cluster)).exists()
    assert bool(found.valid.all())
    assert torch.equal(found.scores, Brightness().score(a_batch()).scores)


def test_an_actor_that_always_dies_leaves_invalid_samples(cluster):
    reward = actors(Brightness(accident="dies", always=True))
    reward._wait_for(0, reward._actor(0), within=300)
    found = attrs.evolve(reward, patience_s=2.0).score(a_batch(2))
    assert not bool(found.valid.any())
    assert bool(torch.isnan(found.scores).all())
    assert "it died" in found.info[0]["error"]
    strict = attrs.evolve(reward, patience_s=0.5, on_failure="raise")
    with pytest.raises(RayRewardError, match="2 images were not scored"):
        strict.score(a_batch(2))


def test_a_reward_that_cannot_be_built_is_not_tried_again():
    found = actors(CannotBeBuilt()).score(a_batch(1))
    assert "the reward could not be built" in found.info[0]["error"]
    assert "no lamp at all" in found.info[0]["error"]


def test_an_error_of_the_reward_is_not_repeated(cluster):
    found = actors(Brightness(accident="raises")).score(a_batch(2))
    assert not bool(found.valid.any())
    assert "no lamp" in found.info[0]["error"]


def test_a_replica_that_does_not_answer_is_passed_over(cluster):
    reward = actors(Brightness(accident="hangs"), replicas=2, timeout_s=4.0, chunk=8)
    found = reward.score(a_batch())
    assert Path(mark(cluster)).exists()
    assert bool(found.valid.all())
    alone = actors(Brightness(accident="hangs", always=True), timeout_s=1.0)
    alone._wait_for(0, alone._actor(0), within=300)
    assert "no answer within 1 s" in alone.score(a_batch(1)).info[0]["error"]
