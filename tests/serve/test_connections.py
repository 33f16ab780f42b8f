"""Clients that are silent, slow or deaf: they are hung up on, and everybody else is served meanwhile."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import attrs
import pytest
import torch

from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.rewards.wire import batch_to_bytes
from rlt2i.serve.protocol import BATCH_TYPE, HEALTH, INFO, SCORE, TOKEN_VARIABLE
from tests.helpers.fake_rewards import Grey, batch_of
from tests.helpers.servers import remote, serving

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

GET = f"GET {HEALTH} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
POST = f"POST {SCORE} HTTP/1.1\r\nhost: x\r\ncontent-type: {BATCH_TYPE}\r\ncontent-length: 1000\r\n".encode()
TOKEN = "swordfish"


@contextlib.contextmanager
def sockets(url: str, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    where = urlsplit(url)
    opened = [socket.create_connection((where.hostname or "", where.port or 0), timeout=5) for _ in range(count)]
    for one in opened:
        one.sendall(first)
    try:
        yield opened
    finally:
        for one in opened:
            one.close()


def hung_up(one: socket.socket, within: float) -> bool:
    """Whether the other side closes the connection in time; what it says first does not count."""
    one.settimeout(within)
    try:
        while one.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def dribble(one: socket.socket, text: bytes, seconds: float) -> bool:
    """Send a byte at a time; whether the other side has hung up by then."""
    give_up, sent = time.monotonic() + seconds, 0
    while time.monotonic() < give_up:
        try:
            one.sendall(text[sent : sent + 1])
        except OSError:
            return True
        sent += sent < len(text) - 1
        time.sleep(0.02)
    return hung_up(one, 0.2)


@pytest.mark.parametrize("first", [b"", b"POST /v1/sc", POST, b"GET / HTTP/1.1\r\nx: "])
def test_hundreds_of_silent_connections_keep_nobody_out(first, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with serving(Grey(), token=TOKEN) as url, sockets(url, 300, first) as silent:
        start = time.monotonic()
        assert remote(url).score(batch_of(3, 4)).scores.tolist() == [3.0, 4.0]
        assert time.monotonic() - start < 2
        assert hung_up(silent[0], 1)  # the oldest made room
        assert not hung_up(silent[-1], 0.05)  # and the youngest still have their time


def test_a_client_that_is_known_keeps_its_connection_among_strangers():
    import httpx

    with serving(Grey(), max_strangers=3) as url, httpx.Client(trust_env=False) as client:
        assert client.get(url + INFO).status_code == 200
        (before,) = client._transport._pool.connections  # type: ignore[attr-defined]
        with sockets(url, 20):
            time.sleep(0.1)
            assert client.get(url + INFO).status_code == 200
            assert client._transport._pool.connections == [before]  # type: ignore[attr-defined]


def test_a_server_out_of_connections_drops_who_has_waited_longest():
    with serving(Grey(), max_strangers=200, max_waiting=1) as url, sockets(url, 280) as silent:
        assert remote(url).score(batch_of(3)).valid.all()
        assert hung_up(silent[0], 1)


def test_headers_that_never_end_have_a_deadline():
    with serving(Grey(), header_seconds=0.3) as url, sockets(url, 3) as (silent, slow, late):
        late.sendall(GET)
        time.sleep(0.15)
        assert b"200" in late.recv(1 << 16)
        assert dribble(slow, b"GET /health HTTP/1.1\r\nx: " + b"y" * 999, 0.6)
        assert hung_up(silent, 0.2)
        assert hung_up(late, 0.2)  # idle since its reply


def test_the_deadline_starts_again_with_every_request():
    with serving(Grey(), header_seconds=0.3) as url, sockets(url, 1) as (one,):
        for _ in range(4):
            one.sendall(GET)
            time.sleep(0.15)
            assert b"200" in one.recv(1 << 16)
        one.sendall(GET + GET + GET)
        time.sleep(0.1)
        assert one.recv(1 << 16).count(b"HTTP/1.1 200") == 3
        assert dribble(one, GET[:-1] + b" " * 99, 0.6)


@pytest.mark.parametrize("token", ["", TOKEN])
def test_a_body_a_byte_at_a_time_has_a_deadline(token):
    with serving(Grey(), token=token, body_seconds=0.3, header_seconds=0.3) as url, sockets(url, 1) as (one,):
        one.sendall(POST + b"\r\n")
        start = time.monotonic()
        assert dribble(one, b"x" * 900, 1.2)
        assert time.monotonic() - start < 1.6


def test_slow_bodies_take_no_place_from_those_without_a_token(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with serving(Grey(), token=TOKEN, max_waiting=1) as url, sockets(url, 40, POST + b"\r\nab") as slow:
        assert remote(url).score(batch_of(5)).scores.tolist() == [5.0]
        assert b"401" in slow[-1].recv(1 << 16)


@attrs.frozen(kw_only=True)
class Mapped(Grey):
    """With maps of 9 MB an image."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        return attrs.evolve(super().score(batch), maps=torch.ones(len(batch.prompts), 1500, 1500))


def test_a_reply_that_nobody_reads_is_given_up():
    size = 2 * 4 * 1500**2
    body = batch_to_bytes(batch_of(1, 2), frozenset({"maps"}))
    head = POST.replace(b"1000", str(len(body)).encode()) + b"\r\n"
    with serving(Mapped(), header_seconds=0.3) as url:
        with sockets(url, 1, head + body) as (deaf,):
            time.sleep(1.0)
            assert len(everything(deaf)) < size
        with sockets(url, 1, head + body) as (reader,):
            assert len(everything(reader, until=size)) > size


def everything(one: socket.socket, *, until: int | None = None) -> bytes:
    """What the other side says before it hangs up, or has said enough."""
    received = bytearray()
    with contextlib.suppress(OSError):
        while (until is None or len(received) <= until) and (part := one.recv(1 << 20)):
            received += part
    return bytes(received)
