"""Nothing secret is written down, nothing else is lost."""

from __future__ import annotations

import pytest

from rlt2i.config.references import ConfigError
from rlt2i.config.secrets import is_secret_name, redacted, redacted_command, redacted_text, refuse_secrets
from rlt2i.recipes import load_recipe
from rlt2i.recipes.catalogue import shipped


@pytest.mark.parametrize(
    "name", ["api_key", "key", "HF_TOKEN", "token", "hub-token", "db_password", "client_secret", "apiKey"]
)
def test_secret_names(name):
    assert is_secret_name(name.replace("-", "_"))


@pytest.mark.parametrize(
    "name",
    [
        "monkey",
        "keys",
        "keyboard",
        "token_env",
        "key_file",
        "mix",
        "name",
        "tokenizer",
        "token_variable",
        "detokenized",
        "secretary",
        "tokenizer_name",
    ],
)
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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/x", "https://<redacted>@host/x"),
        ("no answer from http://a:b@h:1/s?x=1, gave up", "no answer from http://<redacted>@h:1/s?x=1, gave up"),
        ("https://h/s?size=2&api_key=sk-1&token=t#top", "https://h/s?size=2&api_key=<redacted>&token=<redacted>#top"),
        ("a key=value line without a URL, me@host", "a key=value line without a URL, me@host"),
    ],
)
def test_secrets_in_urls_are_redacted_in_any_text(text, shown):
    assert redacted_text(text) == shown


def test_redaction_is_the_identity_on_every_shipped_recipe():
    for name in shipped():
        mapping = load_recipe(name).mapping()
        assert redacted(mapping) == mapping, name
        refuse_secrets(mapping)


@pytest.mark.parametrize("url", ["http://me:pw@host:1", "http://host:1?token=abc"])
def test_a_secret_in_a_url_is_refused_without_repeating_it(url):
    with pytest.raises(ConfigError, match=r"reward\.urls\[0\].*carries a secret") as caught:
        refuse_secrets({"reward": {"urls": [url]}})
    assert "pw" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_a_secret_that_was_left_out_is_asked_for():
    with pytest.raises(ConfigError, match=r"--set reward\.api_key="):
        refuse_secrets({"reward": redacted({"api_key": "sk-1"})})


@pytest.mark.parametrize(
    "text",
    [
        "http://me:s3cret@judge/x",
        "https://user:p@ss:s3cret@host/x",
        "https://user:s3/cret@host/x",
        "http://s3cret@host/x",
        "HTTPS://U:s3cret@H",
        "//me:s3cret@host/x",
        "me:s3cret@host:80/x",
        "postgres://u:s3cret@db/x",
        "https://judge/x#access_token=s3cret",
        "https://judge/x?q=1#token=s3cret&z=1",
        "https://judge/x?sig=s3cret",
        "https://judge/x?X-Amz-Signature=s3cret",
        "https://judge/x?auth=s3cret",
        "https://judge/x?pwd=s3cret",
        "https://judge/x?access%5Ftoken=s3cret",
        "https://h/x?jwt=s3cret&session=s3cret",
        "https://h/?subscription-key=s3cret",
        "Authorization: Bearer s3cret",
        "{'Authorization': 'Bearer s3cret'}",
        "-H 'Authorization: Basic s3cret'",
        "401 Client Error (Bearer s3cret9)",
        "X-Api-Key: s3cret",
        "Cookie: session=s3cret",
        "WANDB_API_KEY=s3cret",
        "wandb_api_key='s3cret'",
        "password=s3cret",
    ],
)
def test_no_spelling_of_a_secret_survives_in_a_message(text):
    said = redacted_text(f"ConnectionError: {text} failed")
    assert "s3" not in said.replace("<redacted>", "")
    assert "cret" not in said
    assert said.startswith("ConnectionError: ")
    assert said.endswith("failed")


@pytest.mark.parametrize("token", ["hf_" + "a1" * 17, "sk-" + "Ab" * 20, "ghp_" + "a1" * 18, "AKIA" + "A1" * 8])
def test_well_known_tokens_are_known_anywhere(token):
    assert redacted_text(f"Invalid token {token}.") == "Invalid token <redacted>."


@pytest.mark.parametrize("place", ["hooks.slack.com/services/", "discord.com/api/webhooks/123456/"])
def test_the_path_of_a_webhook_is_a_secret(place):
    assert "T0s3cretB0s3cret" not in redacted_text(f"POST https://{place}T0s3cretB0s3cret failed")


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8917/v1/score",
        "http://127.0.0.1:8917/@me/x?prompt=a&steps=3#top",
        "see https://huggingface.co/black-forest-labs/FLUX.1-dev",
        "max_tokens=2048 and tokenizer=clip failed at 12:30",
        "missing metadata key(s) ['text']",
        "returned 3 scores for 2 images",
        "'a sign: \"OPEN\"' has no key: value",
        "//comment",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redacted_text(text) == text
