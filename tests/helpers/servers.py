"""Real servers on free ports of this machine: ours in a thread, and one as bad as a test wants it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlt2i.interfaces import Reward
from rlt2i.serve.client import RemoteReward
from rlt2i.serve.protocol import Info
from rlt2i.serve.server import Limits, application, bind, uvicorn_server

Answer = tuple[int, Mapping[str, str], bytes]
OPENED: list[RemoteReward] = []
"""Clients to close."""


@contextmanager
def serving(reward: Reward, *, port: int = 0, token: str = "", **limits: Any) -> Iterator[str]:
    """Our server, for as long as the block lasts; its URL."""
    settings = Limits(**limits)
    listening = bind("127.0.0.1", port, token=token)
    server = uvicorn_server(application(reward, limits=settings, token=token), limits=settings)
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        give_up = time.monotonic() + 30
        while not server.started and time.monotonic() < give_up:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
        assert not thread.is_alive()


class QuietHandler(BaseHTTPRequestHandler):
    """Says nothing of requests."""

    def log_message(self, *_: Any) -> None:
        pass


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


def quiet_server(handler: type[QuietHandler]) -> ThreadingHTTPServer:
    """A server on a free port of this machine, which serves in a thread."""
    server = _Quiet(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class Rogue:
    """Says that it serves `reward`, and answers every batch with `act(number of the request, body)`.

    A float makes it wait that long and then hang up.
    """

    def __init__(self, reward: Reward, act: Callable[[int, bytes], Answer | float]) -> None:
        self.info = Info.of(reward, max_images=64, max_bytes=1 << 22)
        self.act = act
        self.count = 0
        rogue = self

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                self.reply(200, {"content-type": "application/json"}, rogue.info.to_json())

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                rogue.count += 1
                answer = rogue.act(rogue.count, body)
                if isinstance(answer, int | float):
                    time.sleep(answer)
                    self.close_connection = True
                else:
                    self.reply(*answer)

            def reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self.server = quiet_server(Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Rogue:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def remote(*urls: str, **fields: Any) -> RemoteReward:
    """A client in a hurry; it is closed when its test is over."""
    OPENED.append(RemoteReward(**{"urls": urls, "timeout_s": 5.0, "patience_s": 1.0} | fields))
    return OPENED[-1]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
