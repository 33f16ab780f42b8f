"""What must not be written down: values under secret names, and secrets inside URLs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rlt2i.config.references import ConfigError

REDACTED = "<redacted>"

_SECRETS = {"token", "password", "passwd", "secret", "credential", "authorization", "apikey"}
_PLACES = {"env", "file", "path", "var", "variable", "name"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@\"'<>]+(?=@)")
_QUERY_OF_URL = re.compile(r"(?<=[?&;])([\w.-]+)=([^&;#\s\"'<>]+)")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"'<>]+")


def is_secret_name(name: str) -> bool:
    """Whether a field of this name may hold a secret: its words are looked at, not its letters.

    `hub_token`, `apiKey` and `db-password` may; `tokenizer` and `secretary` may not. `token_env` or
    `token_variable` say where a secret is kept, which is not secret.
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _PLACES:
        return False
    return words[-1] == "key" or any(word.removesuffix("s") in _SECRETS for word in words)


def redacted(value: Any, *, secret: bool = False) -> Any:
    """A copy of plain data with the texts under secret names, and the secrets in URLs, replaced.

    Truth values stay, and so do numbers under `*token*` (`max_tokens: 77` must survive a dump).
    """
    if isinstance(value, Mapping):
        return {k: _redacted_field(str(k), v, secret) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, secret=secret) for item in value]
    if isinstance(value, str):
        return REDACTED if secret else redacted_text(value)
    return value


def redacted_text(text: str) -> str:
    """A text in which `user:password@` and `?token=...` of every URL are replaced."""
    return _URL.sub(lambda url: _redacted_url(url[0]), text) if "://" in text else text


def _redacted_url(url: str) -> str:
    shown = _USER_IN_URL.sub(REDACTED, url)
    return _QUERY_OF_URL.sub(lambda m: f"{m[1]}={REDACTED}" if is_secret_name(m[1]) else m[0], shown)


def _redacted_field(name: str, value: Any, secret: bool) -> Any:
    secret = secret or is_secret_name(name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if secret and number and "token" not in name.lower():
        return REDACTED
    return redacted(value, secret=secret)


def redacted_command(arguments: Sequence[str]) -> str:
    """A command line that a shell reads back, with `--token x`, `--set a.api_key=x` and the like replaced."""
    shown: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        option = shown[-1] if shown and shown[-1].startswith("-") and "=" not in shown[-1] else ""
        if _names_secret(option) and not argument.startswith("-"):
            shown.append(REDACTED)
        elif equals and _names_secret(name):
            shown.append(f"{name}={REDACTED}")
        else:
            shown.append(redacted_text(argument))
    return shlex.join(shown)


def _names_secret(option: str) -> bool:
    return is_secret_name(option.lstrip("-").replace("-", "_").rpartition(".")[2])


def refuse_secrets(mapping: Mapping[str, Any]) -> None:
    """Refuse a recipe whose URLs carry secrets, or whose secrets were left out when it was written down.

    Raises:
        ConfigError: naming the field.
    """
    for field, text in _texts(mapping, ""):
        if text == REDACTED:
            raise ConfigError(
                f"{field}: {REDACTED} stands where the secret was left out. Give it again: --set {field}=..."
            )
        if (shown := redacted_text(text)) != text:
            raise ConfigError(
                f"{field}: {shown} carries a secret, which would be written into the run's files and messages. Leave "
                "it out of the URL and hand it over in an environment variable; a served reward names one in "
                "`token_variable`."
            )


def _texts(value: Any, field: str) -> list[tuple[str, str]]:
    """(dotted field, text) of every text in plain data."""
    if isinstance(value, Mapping):
        return [found for k, v in value.items() for found in _texts(v, f"{field}.{k}" if field else str(k))]
    if isinstance(value, list | tuple):
        return [found for i, item in enumerate(value) for found in _texts(item, f"{field}[{i}]")]
    return [(field, value)] if isinstance(value, str) else []
