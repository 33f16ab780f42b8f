"""The server and its client, over real sockets of this machine."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
import torch

from rlt2i.interfaces import RewardBatch
from rlt2i.rewards.batching import failed
from rlt2i.rewards.jpeg import JPEGIncompressibility
from rlt2i.rewards.wire import batch_to_bytes
from rlt2i.serve.protocol import BATCH_TYPE, INFO, SCORE, Info
from rlt2i.serve.server import bind, is_loopback
from rlt2i.tasks.shapes.reward import ShapesReward
from rlt2i.tasks.shapes.task import ShapesTask
from tests.helpers.fake_rewards import Broken, Grey, Needy, batch_of, output_of, raises
from tests.helpers.servers import remote, serving
from tests.serve.test_wire import BAD_BODIES

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

TYPED = {"content-type": BATCH_TYPE}
WANT = frozenset({"maps", "regions"})


def post(url: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(url + SCORE, content=body, headers=TYPED | headers, timeout=10, trust_env=False)


# ------------------------------------------------------------------------------------------------------ the same reward


def assert_same(one, other) -> None:
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(one.valid, other.valid)
    for name, values in other.components.items():
        torch.testing.assert_close(one.components[name], values, rtol=0, atol=0, equal_nan=True)
    assert (one.maps is None) == (other.maps is None)
    if other.maps is not None:
        assert torch.equal(one.maps, other.maps)
    assert (one.regions is None) == (other.regions is None)
    for mine, theirs in zip(one.regions or (), other.regions or (), strict=True):
        assert [(r.box, r.credit, r.label) for r in mine] == [(r.box, r.credit, r.label) for r in theirs]
        assert [r.mask.tolist() for r in mine] == [r.mask.tolist() for r in theirs]


def test_a_served_reward_is_the_reward():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 16, 24), dtype=torch.uint8, generator=generator)
    batch = RewardBatch(images=images, prompts=[str(i) for i in range(7)], metadata=[{}] * 7)
    with serving(JPEGIncompressibility()) as url:
        client = remote(url, chunk=3)
        assert_same(client.score(batch), JPEGIncompressibility().score(batch))
        client.close()  # and it opens again
        assert_same(client.score(batch), JPEGIncompressibility().score(batch))


def test_maps_masks_and_metadata_travel():
    prompts = ShapesTask().eval_prompts(6)
    generator = torch.Generator().manual_seed(1)
    batch = RewardBatch(
        images=torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator) // 128 * 255,
        prompts=[prompt.text for prompt in prompts],
        metadata=[prompt.metadata for prompt in prompts],
        ids=[str(i) for i in range(6)],
    )
    with serving(ShapesReward()) as url:
        client = remote(url, chunk=4)
        assert client.metadata_keys == ShapesReward.metadata_keys
        assert client.offers == ShapesReward.offers
        assert client.span == ShapesReward.span
        assert client.scope == "sample"
        assert_same(client.score(batch, WANT), ShapesReward().score(batch, WANT))
        assert client.fingerprint()["of"] == ShapesReward().fingerprint()


def test_several_servers_share_the_work():
    first, second = Grey(), Grey()
    with serving(first) as one, serving(second) as two:
        client = remote(one, two, chunk=2)
        batch = batch_of(*range(40))
        assert client.score(batch).scores.tolist() == [float(grey) for grey in range(40)]
        assert sum(first.shown) + sum(second.shown) == 40
        assert first.shown
        assert second.shown


def test_chunks_respect_the_servers_limits():
    inner = Grey()
    with serving(inner, max_images=3) as url:
        client = remote(url)
        assert client.score(batch_of(*range(8))).valid.all()
        assert sorted(inner.shown) == [2, 3, 3]


def test_groups_arrive_whole_where_scores_compare_them():
    @attrs.frozen(kw_only=True)
    class Ranked(Grey):
        scope = "group"

    inner = Ranked()
    batch = attrs.evolve(batch_of(1, 2, 3, 4, 5), groups=torch.tensor([0, 0, 0, 1, 1]))
    with serving(inner) as url:
        client = remote(url, chunk=2)
        client.score(batch)
        assert client.scope == "group"
        assert sorted(inner.shown) == [2, 3]


# ------------------------------------------------------------------------------------------------------------ requests


def test_bad_bodies_get_400_and_the_server_lives_on():
    with serving(Grey()) as url:
        for name, body in BAD_BODIES.items():
            reply = post(url, body)
            assert reply.status_code == 400, name
            assert "error" in reply.json()
        assert post(url, batch_to_bytes(batch_of(7))).json()["scores"] == [7.0]


def test_large_bodies_get_413_whether_they_say_so_or_not():
    with serving(Grey(), max_bytes=4096) as url:
        assert post(url, bytes(5000)).status_code == 413

        def endless():
            for _ in range(100):
                yield bytes(1000)

        chunked = httpx.post(url + SCORE, content=endless(), headers=TYPED, timeout=10, trust_env=False)
        assert chunked.status_code == 413
        assert post(url, batch_to_bytes(batch_of(7))).status_code == 200


def test_a_body_that_does_not_arrive_gets_408():
    def slow():
        yield b"x"
        time.sleep(1.0)
        yield b"x"

    with serving(Grey(), body_seconds=0.2) as url:
        reply = httpx.post(url + SCORE, content=slow(), headers=TYPED, timeout=10, trust_env=False)
        assert reply.status_code == 408


def test_huge_http_headers_are_refused():
    with serving(Grey()) as url:
        assert post(url, b"", **{"x-long": "a" * 100_000}).status_code in (400, 431)


def test_requests_that_make_no_sense():
    with serving(Grey(), max_images=2) as url:
        body = batch_to_bytes(batch_of(7))
        wrong_type = httpx.post(url + SCORE, content=body, headers={"content-type": "text/plain"}, trust_env=False)
        assert wrong_type.status_code == 415
        assert httpx.get(url + SCORE, trust_env=False).status_code == 405
        assert httpx.get(url + "/v1/nothing", trust_env=False).status_code == 404
        assert post(url, batch_to_bytes(batch_of(1, 2, 3))).status_code == 400
        unknown = post(url, batch_to_bytes(batch_of(7), frozenset({"poems"})))
        assert unknown.status_code == 400
        assert "poems" in unknown.json()["error"]


def test_health_and_info():
    with serving(Grey(), max_images=5) as url:
        assert httpx.get(url + "/health", trust_env=False).json()["status"] == "ok"
        info = Info.from_json(httpx.get(url + INFO, trust_env=False).content)
        assert (info.reward, info.span, info.max_images) == ("Grey", (0.0, 255.0), 5)
        assert info.details == Grey().fingerprint()


def test_a_token_opens_the_server(monkeypatch):
    monkeypatch.setenv("RLT2I_REWARD_TOKEN", "right")
    with serving(Grey(), token="right") as url:
        assert httpx.get(url + "/health", trust_env=False).status_code == 200
        assert httpx.get(url + INFO, trust_env=False).status_code == 401
        assert post(url, batch_to_bytes(batch_of(1))).status_code == 401
        assert post(url, batch_to_bytes(batch_of(1)), authorization="Bearer wrong").status_code == 401
        assert post(url, batch_to_bytes(batch_of(1)), authorization="Bearer right").status_code == 200
        client = remote(url)
        assert client.score(batch_of(3)).scores.tolist() == [3.0]
        monkeypatch.delenv("RLT2I_REWARD_TOKEN")
        with pytest.raises(ValueError, match="status 401"):
            remote(url).info()


def test_other_machines_need_a_token():
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ValueError, match="RLT2I_REWARD_TOKEN"):
            bind(host, 0, token="")
        assert not is_loopback(host)
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert is_loopback(host)
    bind("0.0.0.0", 0, token="secret").close()


def test_a_taken_port_is_said_so():
    listening = bind("127.0.0.1", 0, token="")
    with pytest.raises(ValueError, match="Choose another --port"):
        bind("127.0.0.1", listening.getsockname()[1], token="")
    listening.close()


# --------------------------------------------------------------------------------------------- repetition and pressure


def test_the_same_ids_are_scored_once():
    inner = Grey()
    with serving(inner) as url:
        first, second = (post(url, batch_to_bytes(batch_of(1, 2, ids=True))) for _ in range(2))
        assert first.content == second.content
        assert inner.shown == [2]
        post(url, batch_to_bytes(batch_of(1, 3, ids=True)))
        assert inner.shown == [2, 2]  # the same ids for other images are another question
        for _ in range(2):
            post(url, batch_to_bytes(batch_of(1, 2)))
        assert inner.shown == [2, 2, 2, 2]  # without ids nothing is remembered


def test_a_repeat_during_the_first_run_waits_for_it():
    calls = []

    def act(batch):
        calls.append(len(batch.prompts))
        time.sleep(0.3)
        return output_of([0.5])

    with serving(Broken(act=act)) as url:
        body = batch_to_bytes(batch_of(1, ids=True))
        with ThreadPoolExecutor(3) as threads:
            replies = list(threads.map(lambda _: post(url, body).json()["scores"], range(3)))
        assert replies == [[0.5]] * 3
        assert calls == [1]


def test_failures_are_not_remembered():
    answers = [failed(1, "busy"), output_of([0.5])]
    with serving(Broken(act=lambda batch: answers.pop(0))) as url:
        body = batch_to_bytes(batch_of(1, ids=True))
        assert post(url, body).json()["valid"] == [False]
        assert post(url, body).json()["scores"] == [0.5]


def test_too_many_requests_get_429_and_patient_clients_get_through():
    gate, running = threading.Event(), threading.Event()

    def act(batch):
        running.set()
        assert gate.wait(10)
        return output_of([0.5] * len(batch.prompts))

    with serving(Broken(act=act), max_waiting=1) as url, ThreadPoolExecutor(2) as threads:
        first = threads.submit(post, url, batch_to_bytes(batch_of(1)))
        assert running.wait(10)
        refused = post(url, batch_to_bytes(batch_of(2)))
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        client = remote(url, patience_s=10.0)
        patient = threads.submit(client.score, batch_of(3))
        time.sleep(0.3)
        gate.set()
        assert first.result(10).status_code == 200
        assert patient.result(15).scores.tolist() == [0.5]


# ---------------------------------------------------------------------------------------------- rewards that misbehave


@pytest.mark.parametrize(
    ("act", "valid", "reason"),
    [
        (raises(RuntimeError("CUDA out of memory")), [False, False], "CUDA out of memory"),
        (raises(KeyError("text")), [False, False], "KeyError"),
        (lambda batch: output_of([float("nan"), 0.5]), [False, True], "nan"),
        (lambda batch: output_of([float("inf"), 0.5]), [False, True], "inf"),
        (lambda batch: output_of([2.0, 0.5]), [False, True], "outside"),
        (lambda batch: output_of([0.5]), [False, False], "1 scores for 2 images"),
        (lambda batch: "nonsense", [False, False], "returned str"),
    ],
)
def test_a_reward_that_fails_on_the_server_is_invalid_at_the_client(act, valid, reason):
    with serving(Broken(act=act)) as url:
        client = remote(url)
        output = client.score(batch_of(1, 2))
        assert output.valid.tolist() == valid
        assert output.scores[~output.valid].isnan().all()
        assert reason in output.info[0]["error"]


def test_missing_metadata_is_invalid_and_the_others_are_scored():
    with serving(Needy()) as url:
        client = remote(url)
        output = client.score(batch_of(1, 2, metadata=[{"value": 4}, {}]))
        assert output.valid.tolist() == [True, False]
        assert output.scores[0] == 4.0
        assert "value" in output.info[1]["error"]


def test_a_missing_package_is_an_error_of_the_server():
    with serving(Broken(act=raises(ImportError("rapidocr")))) as url:
        assert post(url, batch_to_bytes(batch_of(1))).status_code == 500
        client = remote(url)
        output = client.score(batch_of(1))
        assert not output.valid.any()
        assert "status 500" in output.info[0]["error"]


def test_replies_are_standard_json():
    with serving(Broken(act=lambda batch: output_of([float("nan")], components={"x": torch.tensor([1.0])}))) as url:
        reply = post(url, batch_to_bytes(batch_of(1)))

        def refuse(text):
            raise AssertionError(text)

        plain = json.loads(reply.text, parse_constant=refuse)
        assert plain["scores"] == [None]
        assert plain["valid"] == [False]
