"""A reward in the actors of a Ray cluster. It behaves like the reward itself; an actor that dies scores nothing 0."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

import attrs
from attrs import validators

from rlt2i.config import build, to_mapping
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import configuration, failed, merge, split_rows, take_batch
from rlt2i.rewards.http import Backoff
from rlt2i.rewards.validity import checked, score_safely
from rlt2i.rewards.wire import WireError, batch_from_bytes, batch_to_bytes, output_from_bytes, output_to_bytes
from rlt2i.rewards.wrapper import Wrapper

NAMESPACE = "rlt2i-rewards"
PER_REPLICA = 2
"""Chunks under way at one replica: one that is scored and one that is on its way."""

_LOG = logging.getLogger(__name__)


class RayRewardError(RuntimeError):
    """No replica scored a chunk of images, and `on_failure` is "raise"."""


@attrs.define
class _State:
    """What one process keeps between calls."""

    actors: dict[int, Any] = attrs.field(factory=dict)
    deaths: dict[int, int] = attrs.field(factory=dict)
    ready: dict[int, Any] = attrs.field(factory=dict)
    in_flight: dict[int, int] = attrs.field(factory=dict)
    lock: threading.RLock = attrs.field(factory=threading.RLock)


@attrs.frozen(kw_only=True)
class RayReward(Wrapper):
    """Another reward on replicas that are actors of a Ray cluster, shared by all processes of a run.

    It joins the cluster that RAY_ADDRESS names or that this process belongs to, and starts one on this machine where
    there is none. Images go out in chunks as safetensors bytes, each to the replica with the least to do. A chunk
    whose replica died is sent again, there or elsewhere, while a new one starts; after a time-out only elsewhere;
    never after an error of the reward itself, which would come again and makes its images invalid. What was not
    scored in time is invalid.

    Attributes:
        replicas: how many; scores do not depend on it.
        cpus, gpus: that Ray reserves for a replica; parts of a GPU are allowed.
        chunk: images per piece of work.
        timeout_s: seconds for one chunk, from when the replica has started.
        patience_s: seconds over which a chunk is tried again: long enough for a replica to start and load its weights.
        on_failure: what happens to a chunk that nobody scored. "invalid" marks its samples; "raise" raises
            RayRewardError.
    """

    replicas: int = attrs.field(default=1, validator=validators.ge(1))
    cpus: float = attrs.field(default=1.0, validator=validators.ge(0))
    gpus: float = attrs.field(default=0.0, validator=validators.ge(0))
    chunk: int = attrs.field(default=64, validator=validators.ge(1))
    timeout_s: float = attrs.field(default=120.0, validator=validators.gt(0))
    patience_s: float = attrs.field(default=300.0, validator=validators.ge(0))
    on_failure: Literal["invalid", "raise"] = attrs.field(
        default="invalid", validator=validators.in_(("invalid", "raise"))
    )
    _state: _State = attrs.field(init=False, factory=_State, eq=False, repr=False)

    @property
    def offers(self) -> frozenset[str]:
        return self.reward.offers - {"gradient"}  # scores travel, graphs do not

    def fingerprint(self) -> dict[str, Any]:
        """Where a reward runs, and how many of it, decides no score."""
        speed = ("replicas", "cpus", "gpus", "chunk", "timeout_s", "patience_s", "on_failure")
        return configuration(self, without=speed)

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        chunks = split_rows(batch, self.chunk, scope=self.scope)
        with ThreadPoolExecutor(
            min(len(chunks), PER_REPLICA * self.replicas), thread_name_prefix="ray-reward"
        ) as threads:
            outputs = list(threads.map(lambda rows: self._score_chunk(take_batch(batch, rows), want), chunks))
        return merge(list(zip(chunks, outputs, strict=True)), len(batch.prompts))

    def close(self) -> None:
        """Let go of the replicas; those that this process started end with it."""
        with self._state.lock:
            self._state.actors.clear()
            self._state.ready.clear()
        self.reward.close()

    def _score_chunk(self, batch: RewardBatch, want: frozenset[str]) -> RewardOutput:
        count = len(batch.prompts)
        try:
            output = self._try_everywhere(batch_to_bytes(batch, want), count)
        except (RayRewardError, WireError) as error:
            _LOG.error("RayReward: %d images were not scored: %s", count, error)
            if self.on_failure == "raise":
                raise RayRewardError(f"{count} images were not scored: {error}") from error
            return failed(count, f"ray reward: {error}"[:1000])
        return checked(output, self.reward, count)

    def _try_everywhere(self, body: bytes, count: int) -> RewardOutput:
        """Ask replica after replica until one answers.

        Raises:
            RayRewardError: when none did within the patience, or none is left to ask.
        """
        import ray

        backoff = Backoff(deadline=time.monotonic() + self.patience_s)
        useless: set[int] = set()
        reasons: dict[int, str] = {}
        while True:
            for number in self._by_load(without=useless):
                actor = self._actor(number)
                try:
                    with self._counted(number):
                        self._wait_for(number, actor, within=backoff.left)
                        reply = ray.get(actor.score.remote(body), timeout=self.timeout_s)
                    return output_from_bytes(reply[1:], tensors=reply[:1] == b"T", count=count)[0]
                except ray.exceptions.GetTimeoutError:
                    useless.add(number)
                    reasons[number] = f"no answer within {self.timeout_s:g} s"
                except TimeoutError as error:
                    useless.add(number)
                    reasons[number] = "; ".join(filter(None, (reasons.get(number), str(error))))
                except ray.exceptions.RayTaskError as error:  # bytes that are no batch, say: it would come again
                    raise RayRewardError(str(error.cause or error)) from error
                except ray.exceptions.RayActorError as error:
                    self._forget(number, actor)
                    if getattr(error, "actor_init_failed", False):
                        why = str(error).strip().splitlines()[-1]  # the rest is the traceback of the actor
                        raise RayRewardError(f"the reward could not be built: {why}") from error
                    reasons[number] = f"it died: {str(error).splitlines()[0]}"
            said = "; ".join(f"replica {number}: {why}" for number, why in sorted(reasons.items()))
            if len(useless) == self.replicas:
                raise RayRewardError(said)
            if not backoff.pause():
                raise RayRewardError(f"gave up after {self.patience_s:g} s: {said}")

    def _wait_for(self, number: int, actor: Any, *, within: float) -> None:
        """Until the replica has built its reward; starting does not count as the time of a chunk.

        Raises:
            TimeoutError: when it has not started in time.
        """
        import ray

        if self._state.ready.get(number) is actor:
            return
        try:
            ray.get(actor.ready.remote(), timeout=within)
        except ray.exceptions.GetTimeoutError:
            raise TimeoutError(
                f"it did not start in time; are {self.cpus:g} CPUs and {self.gpus:g} GPUs of the cluster free?"
            ) from None
        self._state.ready[number] = actor

    def _actor(self, number: int) -> Any:
        """The replica of this number in the cluster, started if nobody has started it."""
        import ray

        with self._state.lock:
            if number not in self._state.actors:
                if not ray.is_initialized():
                    ray.init(log_to_driver=False, include_dashboard=False)
                recipe = json.dumps(to_mapping(self.reward), sort_keys=True)
                # Ray finds a dead actor by its name for minutes; who has seen it die goes on to the next name.
                deaths = self._state.deaths.get(number, 0)
                name = f"{hashlib.sha256(recipe.encode()).hexdigest()[:16]}-{number}-{deaths}"
                self._state.actors[number] = (
                    ray.remote(Judge)
                    .options(name=name, namespace=NAMESPACE, get_if_exists=True, num_cpus=self.cpus, num_gpus=self.gpus)
                    .remote(recipe)
                )
            return self._state.actors[number]

    def _forget(self, number: int, actor: Any) -> None:
        """Drop a replica that died, unless another thread has replaced it: an actor without a handle ends."""
        with self._state.lock:
            if self._state.actors.get(number) is actor:
                self._state.actors.pop(number, None)
                self._state.deaths[number] = self._state.deaths.get(number, 0) + 1

    def _by_load(self, *, without: set[int]) -> list[int]:
        """The replicas to ask, the idlest first."""
        with self._state.lock:
            busy = dict(self._state.in_flight)
        return sorted(set(range(self.replicas)) - without, key=lambda number: (busy.get(number, 0), number))

    @contextmanager
    def _counted(self, number: int) -> Iterator[None]:
        self._add(number, 1)
        try:
            yield
        finally:
            self._add(number, -1)

    def _add(self, number: int, amount: int) -> None:
        with self._state.lock:
            self._state.in_flight[number] = self._state.in_flight.get(number, 0) + amount


class Judge:
    """What runs in a replica: the reward, built from its recipe."""

    def __init__(self, recipe: str) -> None:
        self._reward: Reward = build(Reward, json.loads(recipe))  # type: ignore[type-abstract]

    def ready(self) -> bool:
        """Answered as soon as the reward is built."""
        return True

    def score(self, body: bytes) -> bytes:
        """A batch in, an output back; both as bytes of the wire format."""
        batch, want = batch_from_bytes(body)
        reply, tensors = output_to_bytes(score_safely(self._reward, batch, want))
        return (b"T" if tensors else b"J") + reply
