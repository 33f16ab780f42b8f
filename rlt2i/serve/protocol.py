"""The words that reward server and client share. Bodies are those of `rlt2i.rewards.wire`.

    POST /v1/score   a batch as safetensors -> scores as JSON, or as safetensors when there are maps or masks
    GET  /v1/info    what is served, for how many images at a time
    GET  /health     whether the server is alive; needs no token

Errors are JSON `{"error": text}`: 400 a body that is no batch, 401 no or a wrong token, 408 a body that does
not arrive, 413 one that is too large, 415 another content type, 429 busy (with Retry-After), 500 a fault of
the server, 503 too many connections, or stopping.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Mapping
from typing import Any, Literal

import attrs

from rlt2i.interfaces import Reward
from rlt2i.rewards.wire import VERSION, WireError

SCORE, INFO, HEALTH = "/v1/score", "/v1/info", "/health"
BATCH_TYPE = "application/x-safetensors"
REPLY_TYPE = "application/json"
KNOWN = "rlt2i.known"
"""Key of an ASGI scope: this request may be answered, so its connection is no stranger's."""
TOKEN_VARIABLE = "RLT2I_REWARD_TOKEN"
"""Environment variable with the bearer token, on both sides."""


@attrs.frozen(kw_only=True)
class Info:
    """What a server says about itself at /v1/info.

    Attributes:
        reward: class name of what is served.
        metadata_keys, offers, span, scope: of the reward.
        fingerprint: of the reward, as `digest` of its content.
        details: the fingerprint itself.
        max_images, max_bytes: of one request.
    """

    reward: str
    metadata_keys: frozenset[str]
    offers: frozenset[str]
    span: tuple[float, float] | None
    scope: Literal["sample", "group"]
    fingerprint: str
    details: Mapping[str, Any]
    max_images: int
    max_bytes: int

    @classmethod
    def of(cls, reward: Reward, *, max_images: int, max_bytes: int) -> Info:
        """The info of a server of `reward`."""
        details = reward.fingerprint()
        return cls(
            reward=type(reward).__name__,
            metadata_keys=frozenset(reward.metadata_keys),
            offers=frozenset(reward.offers),
            span=None if reward.span is None else (float(reward.span[0]), float(reward.span[1])),
            scope=reward.scope,
            fingerprint=digest(details),
            details=details,
            max_images=max_images,
            max_bytes=max_bytes,
        )

    def to_json(self) -> bytes:
        """The body of /v1/info."""
        plain = {"version": VERSION, **attrs.asdict(self)}
        plain |= {"metadata_keys": sorted(self.metadata_keys), "offers": sorted(self.offers)}
        return json.dumps(plain, default=repr).encode()

    @classmethod
    def from_json(cls, body: bytes) -> Info:
        """The inverse of `to_json`.

        Raises:
            WireError: when the body is something else, or of another protocol version.
        """
        try:
            plain = json.loads(body)
            if plain.pop("version") != VERSION:
                raise WireError(f"the server speaks another protocol version; this side speaks {VERSION!r}")
            known = {field.name for field in attrs.fields(cls)}
            kept = {name: value for name, value in plain.items() if name in known}
            kept["metadata_keys"], kept["offers"] = frozenset(kept["metadata_keys"]), frozenset(kept["offers"])
            if kept["scope"] not in ("sample", "group"):
                raise WireError(f"the server's scope is {kept['scope']!r}")
            if kept["span"] is not None:
                low, high = kept["span"]
                kept["span"] = float(low), float(high)
            kept["max_images"], kept["max_bytes"] = int(kept["max_images"]), int(kept["max_bytes"])
            return cls(**kept)
        except WireError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise WireError(f"this is no reward server: {error!r}") from None


def digest(fingerprint: Mapping[str, Any]) -> str:
    """A short name for a fingerprint: 16 hexadecimal digits."""
    text = json.dumps(fingerprint, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
