"""Bytes that are what they say, and bytes that are not."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct

import attrs
import numpy as np
import pytest
import torch
from safetensors.torch import save

from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.rewards.batching import failed
from rlt2i.rewards.wire import (
    MAX_HEADER,
    WireError,
    batch_from_bytes,
    batch_to_bytes,
    output_from_bytes,
    output_to_bytes,
)
from rlt2i.types import Region
from tests.helpers.fake_rewards import batch_of, output_of


def test_a_batch_comes_back_as_it_was():
    images = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = RewardBatch(
        images=images,
        prompts=["a", 'quotes "x" and é 漢字 \u2028', ""],
        metadata=[{"text": "x", "n": [1, [2.5, None]]}, {}, {"deep": {"er": True}}],
        groups=torch.tensor([0, 0, -7]),
        ids=["1/a", "1/b", "2/a"],
    )
    again, want = batch_from_bytes(batch_to_bytes(batch, frozenset({"maps"})))
    assert torch.equal(again.images, images)
    assert (again.prompts, again.metadata, again.ids) == (batch.prompts, batch.metadata, batch.ids)
    assert again.groups.tolist() == [0, 0, -7]
    assert want == {"maps"}


def test_images_need_not_be_contiguous():
    batch = attrs.evolve(batch_of(1), images=torch.arange(48, dtype=torch.uint8).view(1, 4, 4, 3).permute(0, 3, 1, 2))
    assert torch.equal(batch_from_bytes(batch_to_bytes(batch))[0].images, batch.images)


@pytest.mark.parametrize("value", [math.nan, {1, 2}, torch.zeros(1), object()])
def test_metadata_that_is_not_json_is_refused_here_rather_than_there(value):
    with pytest.raises(WireError, match="metadata of sample 1"):
        batch_to_bytes(batch_of(1, 2, metadata=[{}, {"x": value}]))


def test_scores_come_back_bit_for_bit():
    scores = torch.tensor([0.1, 1 / 3, 1e-38, -3.4e38, 16777217.0, math.pi])
    output = output_of(scores, components={"x": scores.flip(0), "none": torch.full((6,), math.nan)})
    body, tensors = output_to_bytes(output, fingerprint="f")
    again, reply = output_from_bytes(body, tensors=tensors, count=6)
    assert not tensors
    assert torch.equal(again.scores, scores)
    assert torch.equal(again.components["x"], scores.flip(0))
    assert again.components["none"].isnan().all()
    assert reply["fingerprint"] == "f"
    assert "NaN" not in body.decode()


def test_places_and_details_come_back():
    output = RewardOutput(
        scores=torch.tensor([1.0, math.nan]),
        valid=torch.tensor([True, False]),
        maps=torch.rand(2, 3, 5),
        regions=[
            [
                Region(box=(0.0, 0.1, 0.2, 0.3), credit=-1.0, label="é", mask=torch.tensor([[True, False]])),
                Region(box=(0.0, 0.0, 1.0, 1.0), credit=0.5),
            ],
            [],
        ],
        info=[{"read": "x", "odd": math.nan, "tensor": torch.zeros(1)}, {"error": "why"}],
    )
    body, tensors = output_to_bytes(output)
    again, _ = output_from_bytes(body, tensors=tensors, count=2)
    assert tensors
    assert torch.equal(again.maps, output.maps)
    first, second = again.regions[0]
    assert (first.box, first.credit, first.label) == ((0.0, 0.1, 0.2, 0.3), -1.0, "é")
    assert first.mask.tolist() == [[True, False]]
    assert second.mask is None
    assert again.regions[1] == []
    assert again.valid.tolist() == [True, False]
    assert again.info[1]["error"] == "why"
    assert again.info[0]["odd"] is None


def body_with(images: torch.Tensor | None = None, *, version: str = "1", name: str = "images", **request) -> bytes:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8) if images is None else images
    count = len(images)
    plain = {"prompts": ["p"] * count, "metadata": [{}] * count, "want": []} | request
    return save({name: images}, metadata={"version": version, "request": json.dumps(plain)})


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, images=np.zeros((1, 3, 4, 4), np.uint8))
    return buffer.getvalue()


BAD_BODIES = {
    "empty": b"",
    "short": b"\x00\x00",
    "garbage": bytes(range(256)) * 4,
    "text": b"hello, is this a reward server? " * 10,
    "pickle": pickle.dumps({"images": [1, 2, 3]}),
    "pickle that would run": b"cos\nsystem\n(S'touch /tmp/owned'\ntR." * 3,
    "torch.save": b"PK\x03\x04" + bytes(100),
    "npz": npz(),
    "huge header": struct.pack("<Q", MAX_HEADER + 1) + bytes(64),
    "endless header": struct.pack("<Q", 2**63) + bytes(64),
    "cut off header": struct.pack("<Q", 500) + b"{}",
    "header is no JSON": with_header(b"\xff" * 20),
    "header is a list": with_header([1]),
    "header nests too deeply": with_header(b"[" * 100_000),
    "no metadata": save({"images": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}),
    "metadata is no object": with_header({"__metadata__": 3}),
    "other version": body_with(version="2"),
    "cut off data": body_with()[:-5],
    "surplus data": body_with() + b"x",
    "other tensor": body_with(name="picture"),
    "floats": body_with(torch.zeros(2, 3, 4, 4)),
    "grey": body_with(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)),
    "three axes": body_with(torch.zeros(3, 4, 4, dtype=torch.uint8)),
    "no images": body_with(torch.zeros(0, 3, 4, 4, dtype=torch.uint8)),
    "too large": body_with(torch.zeros(1, 3, 1, 8193, dtype=torch.uint8)),
    "too few prompts": body_with(prompts=["p"]),
    "prompts are numbers": body_with(prompts=[1, 2]),
    "metadata are texts": body_with(metadata=["a", "b"]),
    "no prompts": body_with(prompts=None),
    "odd ids": body_with(ids=[1, 2]),
    "odd groups": body_with(groups=[1.5, 2]),
    "huge groups": body_with(groups=[1 << 70, 0]),
    "odd want": body_with(want="maps"),
    "lying shape": with_header(
        {
            "images": {"dtype": "U8", "shape": [1, 3, 8000, 8000], "data_offsets": [0, 48]},
            "__metadata__": {"version": "1", "request": "{}"},
        },
        bytes(48),
    ),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_body_that_is_no_batch_is_refused(name):
    with pytest.raises(WireError):
        batch_from_bytes(BAD_BODIES[name])


def test_too_many_images_are_refused():
    with pytest.raises(WireError, match="the limit is 1"):
        batch_from_bytes(body_with(), max_images=1)


def reply_with(**changes: object) -> bytes:
    plain = {"version": "1", "scores": [0.5, 0.5], "valid": [True, True], "components": {}, "info": None} | changes
    return json.dumps(plain).encode()


BAD_REPLIES = {
    "empty": b"",
    "html": b"<html>502</html>",
    "pickle": pickle.dumps([0.5, 0.5]),
    "list": b"[0.5, 0.5]",
    "other version": reply_with(version="9"),
    "too few": reply_with(scores=[0.5]),
    "too many": reply_with(scores=[0.5] * 3),
    "texts": reply_with(scores=["0.5", "0.5"]),
    "booleans": reply_with(scores=[True, False]),
    "no scores": reply_with(scores=None),
    "valid too short": reply_with(valid=[True]),
    "valid of numbers": reply_with(valid=[1, 1]),
    "component too short": reply_with(components={"x": [1]}),
    "components are a list": reply_with(components=[1]),
    "info too short": reply_with(info=[{}]),
    "regions malformed": reply_with(regions=[[{"box": [0, 0]}], []]),
    "regions too few": reply_with(regions=[[]]),
    "mask that is not there": reply_with(regions=[[{"box": [0, 0, 1, 1], "credit": 1, "label": "", "mask": "m"}], []]),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_reply_that_is_no_output_is_refused(name):
    with pytest.raises(WireError):
        output_from_bytes(BAD_REPLIES[name], tensors=False, count=2)


@pytest.mark.parametrize("name", ["empty", "garbage", "pickle", "other tensor"])
def test_a_reply_of_tensors_is_checked_as_well(name):
    with pytest.raises(WireError):
        output_from_bytes(BAD_BODIES[name], tensors=True, count=2)


def test_failures_travel_as_failures():
    again, _ = output_from_bytes(output_to_bytes(failed(2, "no"))[0], tensors=False, count=2)
    assert not again.valid.any()
    assert again.scores.isnan().all()
