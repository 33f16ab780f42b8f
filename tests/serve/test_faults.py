"""Servers that are late, gone, changed or wrong. Nothing hangs, and nothing becomes 0.0."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Iterator

import attrs
import pytest
import torch

from rlt2i.interfaces import RewardOutput
from rlt2i.rewards.wire import batch_from_bytes, output_to_bytes
from rlt2i.serve.client import RemoteReward, RemoteRewardError
from rlt2i.serve.protocol import Info, digest
from tests.helpers.fake_rewards import Broken, Grey, batch_of, output_of
from tests.helpers.servers import Answer, Rogue, free_port, remote, serving

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

JSON = {"content-type": "application/json"}
FINGERPRINT = digest(Grey().fingerprint())


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Every fault is over within seconds."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 20


def right(body: bytes) -> Answer:
    """What an honest server of `Grey` would say."""
    batch, want = batch_from_bytes(body)
    reply, _ = output_to_bytes(Grey().score(batch, want), fingerprint=FINGERPRINT)
    return 200, JSON, reply


def saying(**changes: object) -> Answer:
    plain = {"version": "1", "fingerprint": FINGERPRINT, "scores": [1.0, 2.0], "valid": [True, True]} | changes
    return 200, JSON, json.dumps(plain).encode()


def assert_invalid(output: RewardOutput, reason: str = "") -> None:
    assert not output.valid.any()
    assert output.scores.isnan().all()
    assert all(reason in row["error"] for row in output.info), output.info


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((500, {}, b"Traceback ..."), "status 500"),
        ((400, {}, b"no"), "status 400"),
        ((404, {}, b""), "status 404"),
        ((301, {"location": "http://example.org"}, b""), "status 301"),
        ((200, JSON, b""), "not understood"),
        ((200, {}, b"<html>It works!</html>"), "not understood"),
        ((200, JSON, pickle.dumps([1.0, 2.0])), "not understood"),
        ((200, {"content-type": "application/x-safetensors"}, bytes(range(256))), "not understood"),
        ((200, {"content-type": "application/x-safetensors"}, pickle.dumps([1.0])), "not understood"),
        (saying(scores=[1.0]), "expected 2 numbers"),
        (saying(scores=[1.0, 2.0, 3.0]), "expected 2 numbers"),
        (saying(valid=[True]), "1 valid for 2 images"),
        (saying(scores=["1", "2"]), "not understood"),
        (saying(version="7"), "version"),
        (saying(fingerprint="another"), "another reward"),
    ],
)
def test_a_wrong_answer_is_invalid_at_once(answer, reason):
    with Rogue(Grey(), lambda count, body: answer) as rogue:
        client = remote(rogue.url)
        assert_invalid(client.score(batch_of(1, 2)), reason)
        assert rogue.count == 1  # it would be as wrong again


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("[NaN, 2.0]", [False, True]),
        ("[Infinity, 2.0]", [False, True]),
        ("[-Infinity, 2.0]", [False, True]),
        ("[1e999, 2.0]", [False, True]),
        ("[null, 2.0]", [False, True]),
        ("[-1.0, 2.0]", [False, True]),
        ("[1.0, 256.0]", [True, False]),
    ],
)
def test_scores_that_are_not_finite_or_not_in_range_are_invalid(text, valid):
    _, _, body = saying()
    body = body.replace(b"[1.0, 2.0]", text.encode())
    with Rogue(Grey(), lambda count, _: (200, JSON, body)) as rogue:
        client = remote(rogue.url)
        output = client.score(batch_of(1, 2))
        assert output.valid.tolist() == valid
        assert output.scores.isnan().tolist() == [not ok for ok in valid]


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_server_that_is_busy_or_away_is_asked_again(status):
    act = lambda count, body: right(body) if count == 3 else (status, {"retry-after": "0"}, b"")
    with Rogue(Grey(), act) as rogue:
        client = remote(rogue.url, patience_s=10.0)
        assert client.score(batch_of(4, 5)).scores.tolist() == [4.0, 5.0]
        assert rogue.count == 3


def test_retry_after_is_honoured():
    times = []

    def act(count, body):
        times.append(time.monotonic())
        return right(body) if count == 2 else (429, {"retry-after": "1"}, b"")

    with Rogue(Grey(), act) as rogue:
        client = remote(rogue.url, patience_s=10.0)
        assert client.score(batch_of(4)).valid.all()
        assert times[1] - times[0] >= 0.9


def test_a_server_that_stays_busy_is_given_up():
    with Rogue(Grey(), lambda count, body: (429, {}, b"")) as rogue:
        client = remote(rogue.url, patience_s=0.5)
        assert_invalid(client.score(batch_of(1)), "gave up after 0.5 s")


def test_a_slow_server_is_given_up_and_not_asked_twice():
    with Rogue(Grey(), lambda count, body: 2.0) as rogue:
        client = remote(rogue.url, timeout_s=0.3)
        start = time.monotonic()
        assert_invalid(client.score(batch_of(1)), "no answer within 0.3 s")
        assert time.monotonic() - start < 2
        assert rogue.count == 1


def test_a_server_that_trickles_is_given_up():
    """Every byte comes in time; the whole never does."""
    import socket

    listening = socket.create_server(("127.0.0.1", 0))
    info = Info.of(Grey(), max_images=8, max_bytes=1 << 20).to_json()
    stop = threading.Event()

    def serve():
        while not stop.is_set():
            connection, _ = listening.accept()
            request = connection.recv(1 << 16)
            if request.startswith(b"GET"):
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(info) + info
                )
            else:
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
                while not stop.wait(0.05):
                    try:
                        connection.sendall(b"{")
                    except OSError:
                        break
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    client = remote(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_s=0.5)
    client.info()
    assert_invalid(client.score(batch_of(1)), "no complete answer within 0.5 s")
    stop.set()
    listening.close()


def test_a_server_that_hangs_up_is_asked_again():
    with Rogue(Grey(), lambda count, body: right(body) if count == 2 else 0.0) as rogue:
        client = remote(rogue.url, patience_s=10.0)
        assert client.score(batch_of(6)).scores.tolist() == [6.0]


def test_no_server_at_the_start_is_refused_before_anything_else():
    client = remote(f"http://127.0.0.1:{free_port()}", patience_s=0.3)
    with pytest.raises(ValueError, match=r"no reward server answers at .*serve-reward"):
        _ = client.metadata_keys


def test_a_server_that_dies_later_is_invalid():
    with serving(Grey()) as url:
        client = remote(url, patience_s=0.5)
        assert client.score(batch_of(1)).valid.all()
    assert_invalid(client.score(batch_of(1, 2)), "gave up")


def test_raise_is_there_for_who_wants_it():
    with serving(Grey()) as url:
        client = remote(url, patience_s=0.3, on_failure="raise")
        assert client.score(batch_of(1)).valid.all()
    with pytest.raises(RemoteRewardError, match="2 images were not scored"):
        client.score(batch_of(1, 2))


def test_a_restart_goes_unnoticed():
    port = free_port()
    with serving(Grey(), port=port) as url:
        client = remote(url, patience_s=15.0)
        assert client.score(batch_of(1)).scores.tolist() == [1.0]
    found = []
    waiting = threading.Thread(target=lambda: found.append(client.score(batch_of(8))))
    waiting.start()
    time.sleep(0.7)
    with serving(Grey(), port=port):
        waiting.join(15)
        assert found[0].scores.tolist() == [8.0]


def test_a_restart_with_another_reward_is_noticed():
    port = free_port()
    with serving(Grey(), port=port) as url:
        client = remote(url)
        assert client.score(batch_of(1)).valid.all()
    with serving(Broken(act=lambda batch: output_of([0.5] * len(batch.prompts))), port=port):
        assert_invalid(client.score(batch_of(1)), "another reward")


@pytest.mark.parametrize(
    "fault",
    [
        lambda count, body: (503, {}, b""),
        lambda count, body: 1.0,
        lambda count, body: 0.0,
        lambda count, body: (200, {}, b"garbage"),
        lambda count, body: (500, {}, b"no such package"),
        lambda count, body: saying(fingerprint="other"),
    ],
)
def test_another_endpoint_takes_over(fault):
    inner = Grey()
    with Rogue(Grey(), fault) as rogue, serving(inner) as url:
        client = remote(rogue.url, url, chunk=2, timeout_s=0.6, patience_s=5.0)
        output = client.score(batch_of(1, 2, 3, 4))
        assert output.scores.tolist() == [1.0, 2.0, 3.0, 4.0]
        assert sum(inner.shown) == 4


def test_a_dead_endpoint_is_taken_over_too():
    with serving(Grey()) as alive:
        with serving(Grey()) as mortal:
            client = remote(mortal, alive, chunk=1)
            assert client.score(batch_of(1, 2)).valid.all()
        start = time.monotonic()
        assert client.score(batch_of(*range(10))).scores.tolist() == [float(grey) for grey in range(10)]
        assert time.monotonic() - start < 5


def test_endpoints_must_serve_the_same():
    other = Broken(act=lambda batch: output_of([0.5]))
    with (
        serving(Grey()) as one,
        serving(other) as two,
        pytest.raises(ValueError, match="Start all servers with the same"),
    ):
        remote(one, two).info()


def test_the_expected_reward_can_be_named():
    with serving(Grey()) as url:
        assert remote(url, serves="Grey").info().reward == "Grey"
        with pytest.raises(ValueError, match="serves Grey, expected OCRReward"):
            remote(url, serves="OCRReward").info()


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"<html>", pickle.dumps({"version": "1"}), b'{"version": "2"}'])
def test_an_info_that_is_none_is_refused(body):
    with Rogue(Grey(), lambda count, _: 0.0) as rogue:
        rogue.info = attrs.make_class("Info", [])()
        rogue.info.__class__.to_json = lambda self: body
        with pytest.raises(ValueError, match="no reward server answers"):
            remote(rogue.url).info()


@pytest.mark.parametrize("urls", [(), ("127.0.0.1:1",), ("http://a", "http://a/")])
def test_urls_that_cannot_work_are_refused(urls):
    with pytest.raises(ValueError, match="http://host:port"):
        RemoteReward(urls=urls)


def test_metadata_that_cannot_be_sent_is_invalid():
    with serving(Grey()) as url:
        client = remote(url)
        assert_invalid(client.score(batch_of(1, metadata=[{"x": torch.zeros(1)}])), "cannot be written as JSON")


def test_a_failing_chunk_leaves_the_others_their_scores():
    def act(count, body):
        batch, _ = batch_from_bytes(body)
        return (500, {}, b"boom") if batch.prompts[0] == "grey 3" else right(body)

    with Rogue(Grey(), act) as rogue:
        client = remote(rogue.url, chunk=2)
        output = client.score(batch_of(1, 2, 3, 4, 5, 6))
        assert output.valid.tolist() == [True, True, False, False, True, True]
        assert "boom" in output.info[2]["error"]
