"""A reward on other machines. It behaves like the reward itself; a machine that fails scores nothing 0."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import validators

from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import failed, merge, split_rows, take_batch
from rlt2i.rewards.http import Backoff, Reply, RequestFailed, attempt, bearer, exchange, http_client, send
from rlt2i.rewards.validity import checked
from rlt2i.rewards.wire import WireError, batch_to_bytes, output_from_bytes
from rlt2i.serve.protocol import BATCH_TYPE, INFO, SCORE, TOKEN_VARIABLE, Info

if TYPE_CHECKING:
    import httpx

MAX_ANSWER = 1 << 30
"""Bytes; maps of 256 images at 512x512 are a quarter of it."""
HEADER_ROOM = 1 << 20
"""Bytes of a request that are not pixels."""
PER_ENDPOINT = 2
"""Requests under way at one server: one that is scored and one that is on its way."""
REST_SECONDS = 10.0
"""For which an endpoint that did not answer is asked last."""

_LOG = logging.getLogger(__name__)


def _stripped(urls: Iterable[str]) -> tuple[str, ...]:
    return tuple(url.rstrip("/") for url in urls)


class RemoteRewardError(RuntimeError):
    """No endpoint scored a chunk of images, and `on_failure` is "raise"."""


@attrs.define
class _State:
    """What a client keeps between calls."""

    client: Any = None
    info: Info | None = None
    in_flight: dict[str, int] = attrs.field(factory=dict)
    rests_until: dict[str, float] = attrs.field(factory=dict)
    lock: threading.RLock = attrs.field(factory=threading.RLock)


@attrs.frozen(kw_only=True)
class RemoteReward(Reward):
    """A reward served by `rlt2i serve-reward`, on one or several servers.

    The first use asks every server what it serves; they must agree, and what the reward requires, offers and
    documents is then known here. Images go out in chunks, each to the server with the least to do. A chunk is
    sent again, there or elsewhere, when a server is unreachable, busy (429) or away (502-504); after a time-out,
    a 500 or an answer that makes no sense only elsewhere; never after another error, which would come again.
    What was not scored in time is invalid.

    Attributes:
        urls: of the servers, for example http://127.0.0.1:8917.
        serves: class name of the reward that is expected there; empty accepts any.
        chunk: images per request, fewer where the server or the size of the images asks for it.
        timeout_s: seconds for one answer.
        patience_s: seconds over which a chunk is tried again: long enough for a server to restart, or to score
            what the other processes of a run sent before.
        on_failure: what happens to a chunk that nobody scored. "invalid" marks its samples; a training run
            stops with a message when they are too many, on all processes together. "raise" raises
            RemoteRewardError.
        token_variable: environment variable with the bearer token, sent if it is set.
    """

    urls: tuple[str, ...] = attrs.field(converter=_stripped)
    serves: str = ""
    chunk: int = attrs.field(default=64, validator=validators.ge(1))
    timeout_s: float = attrs.field(default=120.0, validator=validators.gt(0))
    patience_s: float = attrs.field(default=300.0, validator=validators.ge(0))
    on_failure: Literal["invalid", "raise"] = attrs.field(
        default="invalid", validator=validators.in_(("invalid", "raise"))
    )
    token_variable: str = TOKEN_VARIABLE
    _state: _State = attrs.field(init=False, factory=_State, eq=False, repr=False)

    @urls.validator
    def _check_urls(self, _: Any, value: tuple[str, ...]) -> None:
        good = all(url.startswith(("http://", "https://")) for url in value)
        if not value or len(set(value)) != len(value) or not good:
            raise ValueError(f"RemoteReward(urls={list(value)}): give different URLs of the form http://host:port.")

    @property
    def metadata_keys(self) -> frozenset[str]:
        return self.info().metadata_keys

    @property
    def offers(self) -> frozenset[str]:
        return self.info().offers - {"gradient"}  # scores travel, graphs do not

    @property
    def span(self) -> tuple[float, float] | None:
        return self.info().span

    @property
    def scope(self) -> Literal["sample", "group"]:
        return self.info().scope

    @property
    def concurrency(self) -> int:
        """Several chunks of a rollout are on their way at once; the servers queue them."""
        return 4

    def fingerprint(self) -> dict[str, Any]:
        """That of the reward behind the servers: where it runs decides no score."""
        return {"reward": "RemoteReward", "of": dict(self.info().details)}

    def info(self) -> Info:
        """What the servers serve, asked once.

        Raises:
            ValueError: when a server does not answer, or they do not serve the same, or not what is expected.
        """
        with self._state.lock:
            if self._state.info is None:
                infos = {url: self._ask_info(url) for url in self.urls}
                first_url, first = next(iter(infos.items()))
                for url, info in infos.items():
                    if info.fingerprint != first.fingerprint:
                        raise ValueError(
                            f"RemoteReward: {first_url} serves {first.reward} {dict(first.details)} but {url} serves "
                            f"{info.reward} {dict(info.details)}. Start all servers with the same reward and version."
                        )
                if self.serves and self.serves != first.reward:
                    raise ValueError(f"RemoteReward: {first_url} serves {first.reward}, expected {self.serves}.")
                smallest = min(infos.values(), key=lambda info: info.max_bytes)
                fewest = min(info.max_images for info in infos.values())
                self._state.info = attrs.evolve(smallest, max_images=fewest)
            return self._state.info

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        info = self.info()
        room = (info.max_bytes - HEADER_ROOM) // max(1, batch.images[0].numel())
        size = max(1, min(self.chunk, info.max_images, room))
        chunks = split_rows(batch, size, scope=info.scope)
        workers = min(len(chunks), PER_ENDPOINT * len(self.urls))
        with ThreadPoolExecutor(workers, thread_name_prefix="remote-reward") as threads:
            outputs = list(threads.map(lambda rows: self._score_chunk(take_batch(batch, rows), want), chunks))
        return merge(list(zip(chunks, outputs, strict=True)), len(batch.prompts))

    def close(self) -> None:
        with self._state.lock:
            if self._state.client is not None:
                self._state.client.close()
            self._state.client, self._state.info = None, None

    def _score_chunk(self, batch: RewardBatch, want: frozenset[str]) -> RewardOutput:
        count = len(batch.prompts)
        try:
            output = self._try_everywhere(batch_to_bytes(batch, want), count)
        except (RequestFailed, WireError) as error:
            _LOG.error("RemoteReward: %d images were not scored: %s", count, error)
            if self.on_failure == "raise":
                raise RemoteRewardError(f"{count} images were not scored: {error}") from error
            return failed(count, f"remote reward: {error}"[:1000])
        return checked(output, self, count)

    def _try_everywhere(self, body: bytes, count: int) -> RewardOutput:
        """Ask server after server until one answers.

        Raises:
            RequestFailed: when none did within the patience, or none is left to ask.
        """
        backoff = Backoff(deadline=time.monotonic() + self.patience_s)
        useless: dict[str, str] = {}
        while True:
            waits, reasons = [], dict(useless)
            for url in self._by_load(without=useless):
                with self._counted(url):
                    try:
                        reply, why, wait = attempt(self._asker("POST", url + SCORE, body))
                        if reply is not None:
                            return self._decoded(reply, count)
                    except RequestFailed as error:
                        if not error.elsewhere:
                            raise RequestFailed(f"{url}: {error}", elsewhere=False) from error
                        useless[url] = reasons[url] = str(error)
                        continue
                self._state.rests_until[url] = time.monotonic() + REST_SECONDS
                reasons[url] = why
                waits.append(wait or 0.0)
            said = "; ".join(f"{url}: {why}" for url, why in reasons.items())
            if not waits:
                raise RequestFailed(said, elsewhere=False)
            if not backoff.pause(min(waits)):
                raise RequestFailed(f"gave up after {self.patience_s:g} s: {said}", elsewhere=False)

    def _decoded(self, reply: Reply, count: int) -> RewardOutput:
        kind = reply.headers.get("content-type", "").partition(";")[0]
        try:
            output, said = output_from_bytes(reply.body, tensors=kind == BATCH_TYPE, count=count)
        except WireError as error:
            raise RequestFailed(f"an answer that is not understood: {error}", elsewhere=True) from error
        if said.get("fingerprint") != self.info().fingerprint:
            raise RequestFailed("the server was restarted with another reward or version", elsewhere=True)
        return output

    def _ask_info(self, url: str) -> Info:
        try:
            reply = send(self._asker("GET", url + INFO, None), patience_s=min(10.0, self.patience_s))
            return Info.from_json(reply.body)
        except (RequestFailed, WireError) as error:
            raise ValueError(
                f"RemoteReward: no reward server answers at {url}: {error}. Start one with `rlt2i serve-reward "
                f"NAME`, check the URL, and set {self.token_variable or TOKEN_VARIABLE} if it wants a token."
            ) from error

    def _asker(self, method: str, url: str, body: bytes | None) -> Callable[[], Reply]:
        headers = {"content-type": BATCH_TYPE} if body is not None else None
        client = self._client()
        return lambda: exchange(
            client, method, url, content=body, headers=headers, timeout_s=self.timeout_s, max_bytes=MAX_ANSWER
        )

    def _client(self) -> httpx.Client:
        with self._state.lock:
            if self._state.client is None:
                known = self.token_variable and os.environ.get(self.token_variable, "").strip()
                self._state.client = http_client(
                    self.timeout_s,
                    connections=PER_ENDPOINT * len(self.urls) + 2,
                    headers=bearer(self.token_variable) if known else None,
                )
            return self._state.client

    def _by_load(self, *, without: dict[str, str]) -> list[str]:
        """The endpoints to ask, the idlest first and those that just failed last."""
        now = time.monotonic()
        with self._state.lock:
            rests, busy = dict(self._state.rests_until), dict(self._state.in_flight)
        left = [url for url in self.urls if url not in without]
        return sorted(left, key=lambda url: (rests.get(url, 0.0) > now, busy.get(url, 0)))

    def _counted(self, url: str) -> _InFlight:
        return _InFlight(self._state, url)


@attrs.frozen
class _InFlight:
    """Counts a request while it is under way."""

    state: _State
    url: str

    def __enter__(self) -> None:
        self._add(1)

    def __exit__(self, *_: object) -> None:
        self._add(-1)

    def _add(self, number: int) -> None:
        with self.state.lock:
            self.state.in_flight[self.url] = self.state.in_flight.get(self.url, 0) + number
