"""The page on which votes are cast, on this machine alone: what it serves, and to whom.

    GET  /<token>/               the page
    GET  /<token>/state          what is asked now, as JSON
    GET  /<token>/image/<name>   an image of a slate that waits
    POST /<token>/vote           {"question": name, "choice": "left" | "right" | "tie" | "skip"} -> the new state
    POST /<token>/undo           {} -> the new state

It listens on the loopback address only and answers only to a loopback name, so that no web site can reach it under a
name of its own (DNS rebinding). The token is part of the address, and a stranger's guess is compared in constant time.
Nothing that a client sends becomes a path.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import attrs
from jinja2 import PackageLoader

from rlt2i.report.page import environment
from rlt2i.serve.protocol import KNOWN, is_loopback
from rlt2i.serve.server import Limits, bind, uvicorn_server
from rlt2i.voting.ballot import CHOICES
from rlt2i.voting.booth import Booth

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PORT = 8918
PORT_VARIABLE = "RLT2I_VOTE_PORT"
"""Environment variable with the port of the page; 0 takes a free one."""
MOST_BYTES = 4096
"""Of a request's body."""
_SECONDS_TO_SEND = 10.0
_Answer = Callable[["Request"], Awaitable["Response"]]


class _Refused(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def application(booth: Booth, *, token: str) -> Starlette:
    """The ASGI application of the page.

    Args:
        token: a secret that addresses start with.
    """
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    template = environment(PackageLoader("rlt2i.voting")).get_template("vote.html")

    def guarded(answer: _Answer) -> _Answer:
        async def reply(request: Request) -> Response:
            try:
                _authorise(request, token)
                response = await answer(request)
            except _Refused as refused:
                response = JSONResponse({"error": str(refused)}, refused.status)
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        return reply

    async def page(_: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'nonce-{nonce}'; "
            f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(template.render(nonce=nonce), headers={"content-security-policy": policy})

    async def state(_: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(booth.look))

    async def image(request: Request) -> Response:
        name = request.path_params["name"]
        if not booth.shows(name):
            raise _Refused(404, "no such image")
        content = await asyncio.to_thread(booth.folder.file(name).read_bytes)
        return Response(content, media_type="image/png", headers={"cache-control": "private, max-age=86400, immutable"})

    async def vote(request: Request) -> Response:
        sent = await _sent(request)
        name, choice = sent.get("question"), sent.get("choice")
        if not isinstance(name, str) or choice not in CHOICES:
            raise _Refused(400, f"expected a question and a choice of {', '.join(CHOICES)}")
        cast = await asyncio.to_thread(booth.vote, name, choice)
        return JSONResponse(await asyncio.to_thread(booth.look), 200 if cast else 409)

    async def undo(request: Request) -> Response:
        await _sent(request)
        undone = await asyncio.to_thread(booth.undo)
        return JSONResponse(await asyncio.to_thread(booth.look), 200 if undone else 409)

    async def lost(_: Request) -> Response:
        raise _Refused(404, "no such page")

    return Starlette(
        routes=[
            Route("/{token}/", guarded(page)),
            Route("/{token}/state", guarded(state)),
            Route("/{token}/image/{name}", guarded(image)),
            Route("/{token}/vote", guarded(vote), methods=["POST"]),
            Route("/{token}/undo", guarded(undo), methods=["POST"]),
            Route("/{path:path}", guarded(lost)),
        ]
    )


_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


def _authorise(request: Request, token: str) -> None:
    """Refuse names that are not of this machine, requests from other sites, and wrong tokens."""
    places = [f"//{request.headers.get('host', '')}", *request.headers.getlist("origin")]
    if not all(_is_local(place) for place in places):
        raise _Refused(403, "this page answers to 127.0.0.1 and localhost only")
    given = request.path_params.get("token", "")
    if not hmac.compare_digest(given.encode("utf-8", "backslashreplace"), token.encode()):
        raise _Refused(401, "open the address that rlt2i printed, token included")
    request.scope[KNOWN] = True


def _is_local(place: str) -> bool:
    try:
        return is_loopback(urlsplit(place).hostname or "")
    except ValueError:
        return False


async def _sent(request: Request) -> dict[str, Any]:
    """The JSON object of a request's body, given up as soon as it is too large or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _Refused(415, "content-type must be application/json")
    received = bytearray()
    try:
        async with asyncio.timeout(_SECONDS_TO_SEND):
            async for part in request.stream():
                received += part
                if len(received) > MOST_BYTES:
                    raise _Refused(413, f"a body of more than {MOST_BYTES} bytes")
    except TimeoutError:
        raise _Refused(408, f"the body took longer than {_SECONDS_TO_SEND:g} s") from None
    try:
        value = json.loads(received)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _Refused(400, "expected a JSON object")
    return value


@attrs.define
class ServedPage:
    """The page of a booth, served by a thread of its own until it is closed.

    Attributes:
        url: its address, with the token.
    """

    url: str
    _server: uvicorn.Server
    _thread: threading.Thread

    @classmethod
    def open(cls, booth: Booth, *, port: int | None = None) -> ServedPage:
        """Serve a booth on 127.0.0.1.

        Args:
            port: None takes that of RLT2I_VOTE_PORT, else 8918, or a free one where that is taken; 0 takes a free one.

        Raises:
            ValueError: when a port that was asked for is taken, or no number.
        """
        token = secrets.token_urlsafe(24)
        wanted = os.environ.get(PORT_VARIABLE, "").strip() if port is None else str(port)
        if wanted and not (wanted.isascii() and wanted.isdigit() and int(wanted) < 1 << 16):
            raise ValueError(f"{PORT_VARIABLE}={wanted}: a port is a number from 0 to 65535.")
        try:
            listening = bind("127.0.0.1", int(wanted or PORT), token=token, command="vote")
        except ValueError:
            if wanted:
                raise
            listening = bind("127.0.0.1", 0, token=token, command="vote")
        server = uvicorn_server(application(booth, token=token), limits=Limits())
        server.config.timeout_graceful_shutdown = 1
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True, name="votes")
        thread.start()
        return cls(url=f"http://127.0.0.1:{listening.getsockname()[1]}/{token}/", server=server, thread=thread)

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join(10)
