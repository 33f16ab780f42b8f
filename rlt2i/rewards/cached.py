"""Never judge the same image for the same prompt twice."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from typing import Any

import attrs
from attrs import validators

from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.rewards.batching import configuration, merge, take_batch, take_output
from rlt2i.rewards.wrapper import Wrapper


@attrs.frozen(kw_only=True)
class Cached(Wrapper):
    """Another reward with a memory, in this process and for the life of this object.

    An entry is found by the reward's fingerprint, the pixels, the prompt, the metadata and what was wanted
    besides the score. Only valid samples are kept: a failure may pass. Equal images within a batch are judged
    once.

    Attributes:
        size: samples kept; the least recently used are forgotten first.
    """

    size: int = attrs.field(default=4096, validator=validators.ge(1))
    _memory: OrderedDict[bytes, RewardOutput] = attrs.field(init=False, factory=OrderedDict, eq=False, repr=False)
    _lock: threading.Lock = attrs.field(init=False, factory=threading.Lock, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.reward.scope == "group":
            raise ValueError(
                f"Cached({type(self.reward).__name__}): its scores compare the images of a group, so an image "
                "has no score of its own to remember. Use the reward without a cache."
            )

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        keys = sample_keys(self.reward.fingerprint(), batch, want)
        with self._lock:
            known = {key: self._memory[key] for key in keys if key in self._memory}
        rows_of: dict[bytes, list[int]] = {}
        for row, key in enumerate(keys):
            rows_of.setdefault(key, []).append(row)
        new = [key for key in rows_of if key not in known]
        if new:
            output = self.reward.score(take_batch(batch, [rows_of[key][0] for key in new]), want)
            known |= {key: take_output(output, [i]) for i, key in enumerate(new)}
        with self._lock:
            for key in rows_of:
                if bool(known[key].valid[0]):
                    self._memory[key] = known[key]
                    self._memory.move_to_end(key)
            while len(self._memory) > self.size:
                self._memory.popitem(last=False)
        return merge([([row], known[key]) for key, rows in rows_of.items() for row in rows], len(keys))

    def fingerprint(self) -> dict[str, Any]:
        return configuration(self, without=("size",))

    def close(self) -> None:
        with self._lock:
            self._memory.clear()
        self.reward.close()


def sample_keys(fingerprint: dict[str, Any], batch: RewardBatch, want: frozenset[str]) -> list[bytes]:
    """One key per sample; equal keys mean that the same question would be asked."""
    requested = json.dumps([fingerprint, sorted(want), list(batch.images.shape[1:])], sort_keys=True, default=repr)
    pixels = batch.images.cpu().contiguous().numpy()
    keys = []
    for image, prompt, metadata in zip(pixels, batch.prompts, batch.metadata, strict=True):
        digest = hashlib.blake2b(requested.encode(), digest_size=24)
        digest.update(hashlib.blake2b(image.data).digest())
        digest.update(json.dumps([prompt, dict(metadata)], sort_keys=True, default=repr).encode())
        keys.append(digest.digest())
    return keys
