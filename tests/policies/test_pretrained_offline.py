"""A model on the hub without a network: one message that names it and the way out."""

from __future__ import annotations

import huggingface_hub
import pytest

from rlt2i.policies.sd3 import SD3


@pytest.mark.parametrize(
    "failure", [FileNotFoundError("An error happened"), ConnectionError("offline mode"), OSError()]
)
def test_what_cannot_be_fetched_names_repository_and_way_out(failure: OSError, monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    spec = SD3(path="somebody/some-model")
    with pytest.raises(
        ValueError, match=r"SD3\(path='somebody/some-model'\): its files cannot be fetched .*hf download"
    ):
        spec.config("transformer")
