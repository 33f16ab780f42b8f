"""HTTP requests that neither hang nor give up too early: bounded in time, repeated where that makes sense."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import httpx

REPEATABLE = frozenset({429, 502, 503, 504})
"""Statuses of a server that is busy or away. A 500 would be a 500 again."""
CONNECT_SECONDS = 5.0
MAX_PAUSE = 10.0
"""Seconds; also the most that a server's Retry-After is honoured."""

_LOG = logging.getLogger(__name__)


class RequestFailed(RuntimeError):
    """A request that brought no usable answer.

    Attributes:
        elsewhere: whether another server might answer it.
    """

    def __init__(self, message: str, *, elsewhere: bool) -> None:
        super().__init__(message)
        self.elsewhere = elsewhere


@attrs.define
class Backoff:
    """Pauses that double from 0.2 s to 10 s, with jitter, until a deadline.

    Attributes:
        deadline: of `clock`, in seconds.
        clock: seconds that never go back.
    """

    deadline: float
    clock: Callable[[], float] = time.monotonic
    _tries: int = 0

    @property
    def left(self) -> float:
        """Seconds until the deadline; not negative."""
        return max(0.0, self.deadline - self.clock())

    def pause(self, retry_after: float | None = None) -> bool:
        """Wait before another try. False, at once, when it would come too late."""
        seconds = min(MAX_PAUSE, 0.2 * 2**self._tries) * random.uniform(0.75, 1.25)
        seconds = min(MAX_PAUSE, max(seconds, retry_after or 0.0))
        self._tries += 1
        if seconds >= self.left:
            return False
        time.sleep(seconds)
        return True


def http_client(timeout_s: float, *, connections: int, headers: dict[str, str] | None = None) -> httpx.Client:
    """A client that ignores proxies, keeps connections open and never waits longer than told."""
    import httpx

    return httpx.Client(
        timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_SECONDS, timeout_s)),
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        headers=headers,
        trust_env=False,
        follow_redirects=False,
    )


@attrs.frozen(kw_only=True)
class Reply:
    """A complete answer; the names of `headers` are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def exchange(
    client: httpx.Client,
    method: str,
    url: str,
    *,
    content: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float,
    max_bytes: int,
) -> Reply:
    """One request and its answer.

    Args:
        content: body of the request.
        timeout_s: seconds for each step of the exchange, and for the whole body of the answer.
        max_bytes: of the answer.

    Raises:
        RequestFailed: when the answer is late or too large, or the exchange breaks down.
        httpx.TransportError: when another try may help.
    """
    import httpx

    give_up = time.monotonic() + timeout_s
    parts: list[bytes] = []
    size = 0
    try:
        with client.stream(method, url, content=content, headers=headers) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > max_bytes:
                    raise RequestFailed(f"the answer is larger than {max_bytes} bytes", elsewhere=False)
                if time.monotonic() > give_up:
                    raise RequestFailed(f"no complete answer within {timeout_s:g} s", elsewhere=True)
    except httpx.ConnectTimeout:
        raise
    except httpx.TimeoutException as error:
        raise RequestFailed(f"no answer within {timeout_s:g} s ({type(error).__name__})", elsewhere=True) from error
    except httpx.TransportError:
        raise
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise RequestFailed(f"{type(error).__name__}: {error}", elsewhere=False) from error
    return Reply(status=response.status_code, headers=dict(response.headers), body=b"".join(parts))


def attempt(ask: Callable[[], Reply]) -> tuple[Reply | None, str, float | None]:
    """One try.

    Returns:
        The answer, or None, why another try may help, and the seconds that the server asked to wait for it.

    Raises:
        RequestFailed: when another try would not help.
    """
    import httpx

    try:
        reply = ask()
    except httpx.TransportError as error:
        return None, f"{type(error).__name__}: {error}", None
    if reply.status in REPEATABLE:
        return None, f"status {reply.status}", _seconds(reply.headers.get("retry-after", ""))
    if reply.status != 200:
        said = reply.body[:500].decode(errors="replace").strip()
        raise RequestFailed(f"status {reply.status}: {said}", elsewhere=reply.status >= 500)
    return reply, "", None


def _seconds(text: str) -> float | None:
    try:
        return max(0.0, float(text))
    except ValueError:
        return None


def send(ask: Callable[[], Reply], *, patience_s: float) -> Reply:
    """Try until an answer comes, for at most `patience_s` seconds and the last try.

    Raises:
        RequestFailed: when none came, or when another try would not help.
    """
    backoff = Backoff(deadline=time.monotonic() + patience_s)
    while True:
        reply, why, wait = attempt(ask)
        if reply is not None:
            return reply
        if not backoff.pause(wait):
            raise RequestFailed(f"gave up after {patience_s:g} s: {why}", elsewhere=True)
        _LOG.info("trying again: %s", why)


def bearer(variable: str) -> dict[str, str]:
    """The Authorization header from an environment variable, so that no secret is in a recipe; {} without a
    name.

    Raises:
        ValueError: when the variable is named and not set.
    """
    if not variable:
        return {}
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ValueError(f"the environment variable {variable} is not set; put the token there, or name no variable.")
    return {"authorization": f"Bearer {token}"}
