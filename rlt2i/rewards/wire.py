"""Batches and outputs as bytes that can be read without running anything: safetensors and JSON, no pickle.

A batch is one safetensors file: the tensor `images`, [N, 3, H, W] uint8, and in its metadata the protocol
version and a JSON text with prompts, metadata, ids, groups and want. An output is a JSON object, and tensors
only where it has maps or masks. float32 scores survive the trip bit for bit.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.types import Region

VERSION = "1"
MAX_HEADER = 4 << 20
"""Bytes of the safetensors header, which holds prompts and metadata."""
MAX_SIDE = 8192
"""Pixels a side."""


class WireError(ValueError):
    """Bytes that are not what the protocol says; the message says what is wrong with them."""


# ----------------------------------------------------------------------------------------------------------- batches


def batch_to_bytes(batch: RewardBatch, want: frozenset[str] = frozenset()) -> bytes:
    """Encode a batch.

    Raises:
        WireError: when the metadata of a sample cannot be written as JSON.
    """
    for row, metadata in enumerate(batch.metadata):
        try:
            json.dumps(dict(metadata), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise WireError(f"the metadata of sample {row} cannot be written as JSON: {error}.") from None
    request = {
        "prompts": list(batch.prompts),
        "metadata": [dict(metadata) for metadata in batch.metadata],
        "ids": None if batch.ids is None else list(batch.ids),
        "groups": None if batch.groups is None else batch.groups.tolist(),
        "want": sorted(want),
    }
    images = batch.images.detach().cpu().contiguous()
    return save({"images": images}, metadata={"version": VERSION, "request": json.dumps(request)})


def batch_from_bytes(body: bytes, *, max_images: int = 1 << 16) -> tuple[RewardBatch, frozenset[str]]:
    """Decode a batch, trusting nothing.

    Raises:
        WireError: when the bytes are not a batch.
    """
    header = _header(body)
    meta = header.pop("__metadata__", None)
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        version = meta.get("version") if isinstance(meta, dict) else None
        raise WireError(f"protocol version {version!r}, this side speaks {VERSION!r}")
    _check_images(header, len(body), max_images)
    request = _json_object(meta.get("request"), "request")
    images = _tensors(body)["images"]
    count = len(images)
    prompts, metadata = request.get("prompts"), request.get("metadata")
    ids, groups, want = request.get("ids"), request.get("groups"), request.get("want", [])
    _check_rows("prompts", prompts, str, count)
    _check_rows("metadata", metadata, dict, count)
    if ids is not None:
        _check_rows("ids", ids, str, count)
    if groups is not None:
        _check_rows("groups", groups, int, count)
        if any(abs(group) >= 1 << 63 for group in groups):
            raise WireError("groups are not 64-bit integers")
    _check_rows("want", want, str, None)
    batch = RewardBatch(
        images=images,
        prompts=cast("list[str]", prompts),
        metadata=cast("list[dict[str, Any]]", metadata),
        ids=ids,
        groups=None if groups is None else torch.tensor(groups, dtype=torch.long),
    )
    return batch, frozenset(want)


def _header(body: bytes) -> dict[str, Any]:
    """The safetensors header, its size checked before it is parsed."""
    if len(body) < 8:
        raise WireError("not a safetensors body: shorter than its own header")
    (length,) = struct.unpack_from("<Q", body)
    if length > MAX_HEADER:
        raise WireError(f"header of {length} bytes, the limit is {MAX_HEADER} (or this is not a safetensors body)")
    if length > len(body) - 8:
        raise WireError("not a safetensors body: the header is cut off")
    return _json_object(bytes(body[8 : 8 + length]), "header")


def _check_images(header: dict[str, Any], size: int, max_images: int) -> None:
    if set(header) != {"images"}:
        raise WireError(f"expected the one tensor 'images', got {sorted(header)[:8]}")
    entry = header["images"]
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not (isinstance(entry, dict) and entry.get("dtype") == "U8" and isinstance(shape, list) and len(shape) == 4):
        raise WireError("images must be uint8 [N, 3, H, W]")
    if not all(type(n) is int and n > 0 for n in shape) or shape[1] != 3 or max(shape[2:]) > MAX_SIDE:
        raise WireError(f"images must be [N, 3, H, W] with sides up to {MAX_SIDE}, got {shape}")
    if shape[0] > max_images:
        raise WireError(f"{shape[0]} images in one request, the limit is {max_images}")
    if entry.get("data_offsets") != [0, math.prod(shape)] or math.prod(shape) > size:
        raise WireError("the bytes of the images do not match their shape")


def _check_rows(name: str, rows: Any, kind: type, count: int | None) -> None:
    if not isinstance(rows, list) or not all(type(row) is kind for row in rows):
        raise WireError(f"{name} must be a list of {kind.__name__}")
    if count is not None and len(rows) != count:
        raise WireError(f"{len(rows)} {name} for {count} images")


def _json_object(text: Any, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"the {name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError(f"the {name} is not a JSON object")
    return value


def _tensors(body: bytes) -> dict[str, Tensor]:
    try:
        return load(bytes(body))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise WireError(f"not a safetensors body: {error}") from None


# ----------------------------------------------------------------------------------------------------------- outputs


def output_to_bytes(output: RewardOutput, **also: Any) -> tuple[bytes, bool]:
    """Encode an output: (JSON text, False), or (safetensors body, True) when it has maps or masks.

    Args:
        also: further JSON-able entries of the reply, such as the fingerprint.
    """
    reply: dict[str, Any] = {
        "version": VERSION,
        **also,
        "scores": _numbers(output.scores),
        "valid": output.valid.tolist(),
        "components": {name: _numbers(values) for name, values in output.components.items()},
        "info": None if output.info is None else _plain(list(output.info)),
    }
    tensors: dict[str, Tensor] = {}
    if output.maps is not None:
        tensors["maps"] = output.maps.detach().float().cpu().contiguous()
    if output.regions is not None:
        reply["regions"] = [[_region(region, tensors) for region in row] for row in output.regions]
    text = json.dumps(reply, allow_nan=False)
    if not tensors:
        return text.encode(), False
    return save(tensors, metadata={"version": VERSION, "reply": text}), True


def output_from_bytes(body: bytes, *, tensors: bool, count: int) -> tuple[RewardOutput, dict[str, Any]]:
    """Decode an output, and the whole reply for what else it says.

    Args:
        body: the bytes.
        tensors: whether they are a safetensors body.
        count: of images that were sent.

    Raises:
        WireError: when the bytes are not an output of `count` samples.
    """
    received: dict[str, Tensor] = {}
    if tensors:
        meta = _header(body).get("__metadata__")
        reply = _json_object(meta.get("reply") if isinstance(meta, dict) else None, "reply")
        received = _tensors(body)
    else:
        reply = _json_object(body, "reply")
    if reply.get("version") != VERSION:
        raise WireError(f"protocol version {reply.get('version')!r}, this side speaks {VERSION!r}")
    scores = _floats("scores", reply.get("scores"), count)
    valid = reply.get("valid")
    _check_rows("valid", valid, bool, count)
    components, info = reply.get("components", {}), reply.get("info")
    if not isinstance(components, dict):
        raise WireError("components must be an object")
    if info is not None:
        _check_rows("info", info, dict, count)
    maps = received.get("maps")
    if maps is not None and (maps.ndim != 3 or len(maps) != count or maps.dtype is not torch.float32):
        raise WireError(f"maps must be float32 [{count}, h, w]")
    output = RewardOutput(
        scores=scores,
        valid=torch.tensor(valid, dtype=torch.bool),
        components={name: _floats(name, values, count) for name, values in components.items()},
        regions=_regions(reply.get("regions"), received, count),
        maps=maps,
        info=info,
    )
    return output, reply


def _numbers(values: Tensor) -> list[float | None]:
    """JSON has no nan: what is not finite is null."""
    return [value if math.isfinite(value) else None for value in values.float().tolist()]


def _floats(name: str, values: Any, count: int) -> Tensor:
    if not isinstance(values, list) or len(values) != count:
        raise WireError(f"{name}: expected {count} numbers, got {len(values) if isinstance(values, list) else 'none'}")
    if not all(value is None or type(value) in (int, float) for value in values):
        raise WireError(f"{name}: expected numbers or null")
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float32)


def _region(region: Region, tensors: dict[str, Tensor]) -> dict[str, Any]:
    plain: dict[str, Any] = {"box": list(region.box), "credit": region.credit, "label": region.label}
    if region.mask is not None:
        plain["mask"] = f"mask{len(tensors)}"
        tensors[plain["mask"]] = region.mask.detach().cpu().to(torch.uint8).contiguous()
    return plain


def _regions(rows: Any, tensors: Mapping[str, Tensor], count: int) -> list[list[Region]] | None:
    if rows is None:
        return None
    _check_rows("regions", rows, list, count)
    try:
        return [
            [
                Region(
                    box=tuple(float(edge) for edge in plain["box"]),  # type: ignore[arg-type]
                    credit=float(plain["credit"]),
                    label=str(plain["label"]),
                    mask=tensors[plain["mask"]].bool() if "mask" in plain else None,
                )
                for plain in row
            ]
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"regions are malformed: {error!r}") from None


def _plain(value: Any) -> Any:
    """JSON-able, at the price of detail: nan and infinity become null, unknown objects their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
