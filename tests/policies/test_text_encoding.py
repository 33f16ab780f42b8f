"""Encoded prompts: kept in memory and on disk, whatever becomes of the encoders."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.policies.pretrained.text import fingerprint
from rlt2i.policies.sd3 import SD3, SD3Policy
from rlt2i.types import Prompts

PROMPTS = Prompts.of(["a red cat", "two boxes"])


@pytest.fixture(scope="module")
def spec(t5_pipeline):
    return SD3(path=str(t5_pipeline), max_sequence_length=12)


@pytest.fixture(scope="module")
def expected(spec):
    return spec.load().encode(PROMPTS)


@pytest.fixture
def calls(monkeypatch):
    """The texts that an encoder saw."""
    seen, original = [], SD3Policy.encode_text

    def count(self, text, **options):
        seen.append(text)
        return original(self, text, **options)

    monkeypatch.setattr(SD3Policy, "encode_text", count)
    return seen


@pytest.mark.parametrize("residence", ["cpu", "disk"])
def test_encoders_that_leave_the_device_encode_the_same(spec, expected, calls, residence):
    policy = attrs.evolve(spec, text_encoders=residence).load()
    freed = [getattr(policy.pipe, name) is None for name in policy.text.names]
    assert freed == [residence == "disk"] * 3
    for _ in range(2):
        conditioning = policy.encode(PROMPTS)
        for name, tensor in expected.tensors.items():
            assert torch.equal(conditioning.tensors[name], tensor)
    assert calls == list(PROMPTS.texts)
    assert [getattr(policy.pipe, name) is None for name in policy.text.names] == freed


def test_a_second_run_reads_what_the_first_has_encoded(spec, expected, calls, tmp_path):
    cached = attrs.evolve(spec, text_cache=str(tmp_path))
    for _ in range(2):
        conditioning = cached.load().encode(PROMPTS)
        for name, tensor in expected.tensors.items():
            assert torch.equal(conditioning.tensors[name], tensor)
    assert calls == list(PROMPTS.texts)
    assert {file.suffix for file in tmp_path.rglob("*.*")} == {".safetensors"}


def test_other_encoders_and_options_never_share_a_cache(spec, clip_pipeline):
    others = [
        attrs.evolve(spec, dtype="bfloat16"),
        attrs.evolve(spec, max_sequence_length=11),
        SD3(path=str(clip_pipeline), max_sequence_length=12),
    ]
    assert len({fingerprint(each) for each in (spec, *others)}) == 4
    assert fingerprint(attrs.evolve(spec, lora_rank=2, guidance_scale=2.0, text_cache="x")) == fingerprint(spec)


def test_a_negative_prompt_is_another_entry(spec, calls):
    policy = spec.load()
    policy.encode_with_negative(PROMPTS, "two boxes")
    assert calls == [*PROMPTS.texts, "two boxes"]
