"""CPU rewards on several cores."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

import attrs
import torch
from attrs import validators

from rlt2i.config import build, to_mapping
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import configuration, failed, merge, split_rows, take_batch
from rlt2i.rewards.validity import checked, score_safely
from rlt2i.rewards.wire import batch_from_bytes, batch_to_bytes, output_from_bytes, output_to_bytes
from rlt2i.rewards.wrapper import Wrapper

_LOG = logging.getLogger(__name__)


def usable_cores() -> int:
    """Cores that this process may use: of its affinity mask, shared with the other ranks of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)))


@attrs.frozen(kw_only=True)
class Pooled(Wrapper):
    """Another reward on several workers; every worker scores some images of the batch.

    A chunk whose worker raises or dies is invalid; the other chunks keep their scores. Scores do not depend
    on the number of workers. Processes are started with `spawn`, so a script that uses them needs the usual
    `if __name__ == "__main__":`. They are handed the reward's recipe and safetensors bytes, never pickled
    objects.

    Attributes:
        workers: how many; 0 means one per usable core.
        kind: threads share the reward, which must allow it, and suit work that releases Python's lock (ONNX,
            OpenCV, HTTP); processes build a reward each.
        chunk: images per piece of work.
    """

    workers: int = attrs.field(default=0, validator=validators.ge(0))
    kind: Literal["thread", "process"] = attrs.field(default="thread", validator=validators.in_(("thread", "process")))
    chunk: int = attrs.field(default=8, validator=validators.ge(1))
    _pool: list[ProcessPoolExecutor] = attrs.field(init=False, factory=list, eq=False, repr=False)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock, eq=False, repr=False)

    def networks(self) -> Mapping[str, int | None]:
        return self.reward.networks() if self.kind == "thread" else {}

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        rows = split_rows(batch, self.chunk, scope=self.scope)
        pieces = [take_batch(batch, chunk) for chunk in rows]
        outputs = self._in_threads(pieces, want) if self.kind == "thread" else self._in_processes(pieces, want)
        return merge(list(zip(rows, outputs, strict=True)), len(batch.prompts))

    def fingerprint(self) -> dict[str, Any]:
        return configuration(self, without=("workers", "kind", "chunk"))

    def close(self) -> None:
        with self._lock:
            for pool in self._pool:
                pool.shutdown(wait=False, cancel_futures=True)
            self._pool.clear()
        self.reward.close()

    def _in_threads(self, pieces: list[RewardBatch], want: frozenset[str]) -> list[RewardOutput]:
        with ThreadPoolExecutor(self.workers or usable_cores(), thread_name_prefix="reward") as threads:
            return list(threads.map(lambda piece: score_safely(self.reward, piece, want), pieces))

    def _in_processes(self, pieces: list[RewardBatch], want: frozenset[str]) -> list[RewardOutput]:
        pool = self._processes()
        outputs = []
        try:
            futures = [pool.submit(_work, batch_to_bytes(piece, want)) for piece in pieces]
        except BrokenProcessPool as error:
            self._forget(pool)
            return [failed(len(piece.prompts), f"the worker processes died: {error}") for piece in pieces]
        for future, piece in zip(futures, pieces, strict=True):
            count = len(piece.prompts)
            try:
                outputs.append(checked(_decoded(future.result(), count), self.reward, count))
            except Exception as error:
                if isinstance(error, BrokenProcessPool):
                    self._forget(pool)
                _LOG.error("Pooled: a chunk of %d failed: %r", count, error)
                outputs.append(failed(count, f"{type(error).__name__}: {error}"[:1000]))
        return outputs

    def _processes(self) -> ProcessPoolExecutor:
        with self._lock:
            if not self._pool:
                recipe = json.dumps(to_mapping(self.reward))
                self._pool.append(
                    ProcessPoolExecutor(
                        self.workers or usable_cores(),
                        mp_context=multiprocessing.get_context("spawn"),
                        initializer=_start,
                        initargs=(recipe,),
                    )
                )
            return self._pool[0]

    def _forget(self, pool: ProcessPoolExecutor) -> None:
        """Drop a broken pool; the next batch starts a new one."""
        with self._lock:
            if pool in self._pool:
                self._pool.remove(pool)
        pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------ in the worker process

_REWARD: list[Reward] = []


def _start(recipe: str) -> None:
    """Build the reward once per worker process."""
    torch.set_num_threads(1)
    _REWARD[:] = [build(Reward, json.loads(recipe))]  # type: ignore[type-abstract]


def _work(body: bytes) -> bytes:
    batch, want = batch_from_bytes(body)
    reply, tensors = output_to_bytes(score_safely(_REWARD[0], batch, want))
    return (b"T" if tensors else b"J") + reply


def _decoded(framed: bytes, count: int) -> RewardOutput:
    """What `_work` returned."""
    return output_from_bytes(framed[1:], tensors=framed[:1] == b"T", count=count)[0]
