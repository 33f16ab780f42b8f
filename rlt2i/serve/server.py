"""`rlt2i serve-reward NAME`: one reward behind HTTP.

It listens on 127.0.0.1 unless told otherwise, and on any other address only with a bearer token. One batch is
scored at a time; a few may wait, more are told to come back (429). A request with ids that was answered
before is answered again from memory, so a client may repeat what got lost. Whatever the reward does, the
answer says which samples are valid; nothing is scored 0 because it failed.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import json
import logging
import os
import socket
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import attrs
from attrs import validators

from rlt2i.interfaces import Reward, RewardBatch
from rlt2i.rewards.naming import named_reward
from rlt2i.rewards.validity import score_safely
from rlt2i.rewards.wire import WireError, batch_from_bytes, output_to_bytes
from rlt2i.serve.protocol import (
    BATCH_TYPE,
    HEALTH,
    INFO,
    KNOWN,
    REPLY_TYPE,
    SCORE,
    TOKEN_VARIABLE,
    Info,
    is_loopback,
)

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

REMEMBERED_BYTES = 64 << 20
"""Of replies kept for requests that are repeated."""
PORT = 8917
_LOG = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class Limits:
    """What a server accepts, and how long it waits.

    Attributes:
        max_images: per request.
        max_bytes: of a request's body.
        max_waiting: requests admitted at a time, the one being scored included.
        body_seconds: for a request's body to arrive.
        header_seconds: for the headers of a request to be complete, and for a client to go on reading a reply.
        max_strangers: connections without a request under way that have not shown the token yet; the oldest goes.
    """

    max_images: int = attrs.field(default=256, validator=validators.ge(1))
    max_bytes: int = attrs.field(default=512 << 20, validator=validators.ge(1 << 10))
    max_waiting: int = attrs.field(default=8, validator=validators.ge(1))
    body_seconds: float = attrs.field(default=60.0, validator=validators.gt(0))
    header_seconds: float = attrs.field(default=10.0, validator=validators.gt(0))
    max_strangers: int = attrs.field(default=32, validator=validators.ge(1))


class _Refused(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@attrs.define
class _Service:
    """The state of one server; everything but `_judge` runs in its event loop."""

    reward: Reward
    limits: Limits
    token: str
    info: Info
    waiting: int = 0
    stopping: bool = False
    gate: asyncio.Lock = attrs.field(factory=asyncio.Lock)
    running: dict[bytes, asyncio.Task[tuple[bytes, str]]] = attrs.field(factory=dict)
    remembered: OrderedDict[bytes, tuple[bytes, str]] = attrs.field(factory=OrderedDict)

    async def score(self, request: Request) -> Response:
        from starlette.responses import Response

        try:
            self.authorise(request)
            if self.stopping:
                raise _Refused(503, "the server is stopping")
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != BATCH_TYPE:
                raise _Refused(415, f"content-type must be {BATCH_TYPE}")
            if self.waiting >= self.limits.max_waiting:
                raise _Refused(429, f"{self.waiting} requests are waiting already")
            self.waiting += 1
            try:
                reply, kind = await self.answer(await self.body(request))
            finally:
                self.waiting -= 1
        except _Refused as refused:
            return _error(refused.status, str(refused))
        except Exception:
            _LOG.exception("a request failed")
            return _error(500, "internal error; the server's log says more")
        return Response(reply, media_type=kind)

    async def describe(self, request: Request) -> Response:
        from starlette.responses import Response

        try:
            self.authorise(request)
        except _Refused as refused:
            return _error(refused.status, str(refused))
        return Response(self.info.to_json(), media_type=REPLY_TYPE)

    async def health(self, _: Request) -> Response:
        from starlette.responses import JSONResponse

        status = "stopping" if self.stopping else "ok"
        return JSONResponse({"status": status, "waiting": self.waiting}, 503 if self.stopping else 200)

    def authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self.token and not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise _Refused(401, f"a bearer token is needed; the client takes it from {TOKEN_VARIABLE}")
        request.scope[KNOWN] = True

    async def body(self, request: Request) -> bytes:
        """The request's body, given up as soon as it is too large or too slow."""
        limit = self.limits.max_bytes
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            raise _Refused(413, f"a body of {declared} bytes, the limit is {limit}")
        received = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    received += part
                    if len(received) > limit:
                        raise _Refused(413, f"a body of more than {limit} bytes")
        except TimeoutError:
            raise _Refused(408, f"the body took longer than {self.limits.body_seconds:g} s") from None
        return bytes(received)

    async def answer(self, body: bytes) -> tuple[bytes, str]:
        """The reply to a batch: from memory, from a run under way for the same question, or from its own."""
        try:
            batch, want = await asyncio.to_thread(batch_from_bytes, body, max_images=self.limits.max_images)
        except WireError as error:
            raise _Refused(400, str(error)) from None
        unknown = sorted(want - self.info.offers)
        if unknown:
            raise _Refused(400, f"{self.info.reward} does not offer {unknown}, only {sorted(self.info.offers)}")
        if batch.ids is None:
            return await self.run(None, batch, want)
        key = await asyncio.to_thread(_key, batch, want)
        if key in self.remembered:
            self.remembered.move_to_end(key)
            return self.remembered[key]
        if key not in self.running:
            self.running[key] = asyncio.create_task(self.run(key, batch, want))
            self.running[key].add_done_callback(lambda _: self.running.pop(key, None))
        # A client that goes away does not spoil the run for its retry.
        return await asyncio.shield(self.running[key])

    async def run(self, key: bytes | None, batch: RewardBatch, want: frozenset[str]) -> tuple[bytes, str]:
        async with self.gate:
            reply, kind, complete = await asyncio.to_thread(self._judge, batch, want)
        if key is not None and complete:
            self.remembered[key] = reply, kind
            while sum(len(kept) for kept, _ in self.remembered.values()) > REMEMBERED_BYTES:
                self.remembered.popitem(last=False)
        return reply, kind

    def _judge(self, batch: RewardBatch, want: frozenset[str]) -> tuple[bytes, str, bool]:
        """The reply, its type, and whether every sample was judged: a failure may pass, so it is not kept."""
        output = score_safely(self.reward, batch, want)
        reply, tensors = output_to_bytes(output, fingerprint=self.info.fingerprint)
        return reply, BATCH_TYPE if tensors else REPLY_TYPE, bool(output.valid.all())


def _key(batch: RewardBatch, want: frozenset[str]) -> bytes:
    """What is asked, as a hash of its content: the order of entries in a safetensors header is not fixed."""
    groups = None if batch.groups is None else batch.groups.tolist()
    requested = [list(batch.ids or ()), list(batch.prompts), list(batch.metadata), groups, sorted(want)]
    key = hashlib.blake2b(json.dumps([*requested, list(batch.images.shape)], sort_keys=True).encode())
    key.update(batch.images.numpy().data)
    return key.digest()


def _error(status: int, message: str) -> Response:
    from starlette.responses import JSONResponse

    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse({"error": message}, status, headers)


def application(reward: Reward, *, limits: Limits | None = None, token: str = "") -> Starlette:
    """The ASGI application that serves a reward. It closes the reward when it shuts down.

    Args:
        reward: what to serve; it is only used in one thread at a time.
        limits: of requests.
        token: that clients must present; empty lets everybody in.
    """
    from starlette.applications import Starlette
    from starlette.routing import Route

    limits = limits or Limits()
    info = Info.of(reward, max_images=limits.max_images, max_bytes=limits.max_bytes)
    service = _Service(reward=reward, limits=limits, token=token, info=info)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.stopping = True
        reward.close()

    routes = [
        Route(SCORE, service.score, methods=["POST"]),
        Route(INFO, service.describe, methods=["GET"]),
        Route(HEALTH, service.health, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def bind(host: str, port: int, *, token: str, command: str = "serve-reward") -> socket.socket:
    """A listening socket.

    Args:
        command: for messages.

    Raises:
        ValueError: when others could reach it without a token, or the port is taken.
    """
    if not is_loopback(host) and not token:
        raise ValueError(
            f"{command} --host {host}: others could reach the server, so it needs a token. Set {TOKEN_VARIABLE} "
            "to the same secret here and where you train, or stay on 127.0.0.1 and use an SSH tunnel."
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        message = f"{command}: cannot listen on {host} port {port}: {error}. Choose another --port."
        raise ValueError(message) from error


def uvicorn_server(app: Starlette, *, limits: Limits) -> uvicorn.Server:
    """The HTTP server of an application; it takes 16 kB of headers, and says 503 beyond its connections."""
    import uvicorn

    from rlt2i.serve.connections import patient

    most = limits.max_waiting + limits.max_strangers + 64
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=patient(seconds=limits.header_seconds, most_strangers=limits.max_strangers, most_connections=most),
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=16 << 10,
            limit_concurrency=most,
            timeout_graceful_shutdown=10,
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a reward until interrupted. See `rlt2i serve-reward --help`."""
    from rlt2i.recipes.parts import PARTS

    options = parser().parse_args(arguments)
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    reward = named_reward(options.name, options.set, parts=PARTS)
    limits = Limits(
        max_images=options.max_images,
        max_bytes=options.max_mib << 20,
        max_waiting=options.max_waiting,
    )
    app = application(reward, limits=limits, token=token)
    listening = bind(options.host, options.port, token=token)
    host, port = listening.getsockname()[:2]
    print(
        json.dumps({"reward": type(reward).__name__, "url": f"http://{f'[{host}]' if ':' in host else host}:{port}"}),
        flush=True,
    )
    uvicorn_server(app, limits=limits).run(sockets=[listening])
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `rlt2i serve-reward`."""
    words = argparse.ArgumentParser(prog="rlt2i serve-reward", description="Serve a reward over HTTP.")
    words.add_argument("name", help="short name, module:Class, file.py:Class, or a YAML file with a reward or a recipe")
    words.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the reward; may be repeated",
    )
    words.add_argument("--host", default="127.0.0.1", help=f"default 127.0.0.1; any other needs {TOKEN_VARIABLE}")
    words.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0 takes a free one")
    words.add_argument("--max-images", type=int, default=256, help="per request (default 256)")
    words.add_argument("--max-mib", type=int, default=512, help="MiB of a request (default 512)")
    words.add_argument("--max-waiting", type=int, default=8, help="requests at a time, others get 429 (default 8)")
    return words
