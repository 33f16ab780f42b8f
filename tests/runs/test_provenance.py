"""Nothing secret is written down, nothing else is lost."""

from __future__ import annotations

import pytest

from rlt2i.runs.provenance import is_secret_name, redacted, redacted_command, versions


@pytest.mark.parametrize("name", ["api_key", "key", "HF_TOKEN", "token", "hub-token", "db_password", "client_secret"])
def test_secret_names(name):
    assert is_secret_name(name.replace("-", "_"))


@pytest.mark.parametrize("name", ["monkey", "keys", "keyboard", "token_env", "key_file", "mix", "name"])
def test_innocent_names(name):
    assert not is_secret_name(name)


def test_redaction():
    given = {
        "api_key": "sk-1",
        "password": 1234,
        "max_tokens": 77,
        "use_token": True,
        "tokens": ["a", {"b": "c"}],
        "url": "https://me:pw@host/x",
        "list": [{"hub_token": "hf_1"}, "plain"],
    }
    gone = "<redacted>"
    assert redacted(given) == {
        "api_key": gone,
        "password": gone,
        "max_tokens": 77,
        "use_token": True,
        "tokens": [gone, {"b": gone}],
        "url": "https://<redacted>@host/x",
        "list": [{"hub_token": gone}, "plain"],
    }
    assert given["api_key"] == "sk-1"


def test_command_lines_are_redacted():
    command = ["rlt2i", "--hub-token", "hf_1", "--set", "reward.api_key=sk 2", "--token=x", "--seed", "3"]
    assert redacted_command(command) == (
        "rlt2i --hub-token '<redacted>' --set 'reward.api_key=<redacted>' '--token=<redacted>' --seed 3"
    )


def test_versions_name_the_commit_only_of_our_own_repository():
    found = versions()
    assert found["git"] is None or set(found["git"]) == {"commit", "dirty"}
    assert found["rlt2i"]
