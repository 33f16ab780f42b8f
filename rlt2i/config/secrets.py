"""What must not be written down: values under secret names, and secrets inside URLs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from rlt2i.config.references import ConfigError

REDACTED = "<redacted>"

_SECRETS = {"token", "password", "passwd", "secret", "credential", "authorization", "apikey"}
_PLACES = {"env", "file", "path", "var", "variable", "name"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_USER_IN_URL = re.compile(r"(?<=//)(?:[^/\s:@\"'<>]*:(?!\d*/)[^\s?#\"'<>]+|[^/\s?#\"'<>]+)(?=@)")
"""Up to the last @, since a password may hold one; what follows a colon is a port where it is digits before a slash."""
_QUERY_OF_URL = re.compile(r"(?<=[?&;#])([\w.%-]+)=([^&;#\s\"'<>]+)")
_URL = re.compile(r"(?:[a-zA-Z][a-zA-Z0-9+.-]*:|(?<![\w:/]))//[^\s\"'<>]+")
_IN_QUERY = {"sig", "signature", "auth", "pwd", "pass", "jwt", "session", "bearer", "sas"}
"""Words of a query's names that would mean nothing as the name of a field."""

_HEADER = re.compile(
    r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|x-[\w-]*(?:key|token|secret))(\W{1,4})((?:bearer|basic|token)\s+)?"
    r"[^\s\"',;<>}\]]+"
)
_SCHEME = re.compile(r"(?i)\b(bearer|basic)(\s+)(?=[\w.~+/-]*\d)[\w.~+/-]{6,}=*")
_ASSIGNED = re.compile(r"([\w.-]+)(=[\"']?)([^\s\"'&;,<>]{4,})")
_LOGIN = re.compile(r"(?<![\w/])[\w.-]+:[^\s:@/\"'<>]+(?=@[\w-]+(?:\.[\w-]+)*(?:[:/]|\b))")
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16}"
    r"|(?<=hooks\.slack\.com/services/)[\w/]{10,}|(?<=/api/webhooks/)\d+/[\w-]{10,}"
    r"|xox[abprs]-[\w-]{10,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
"""Shapes of tokens that say themselves what they are."""


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
        return REDACTED if secret else redacted_urls(value)
    return value


def redacted_text(text: str) -> str:
    """A message in which secrets are replaced: of URLs, headers, assignments and logins, and well-known tokens."""
    text = _HEADER.sub(lambda m: f"{m[1]}{m[2]}{m[3] or ''}{REDACTED}", redacted_urls(text))
    text = _SCHEME.sub(lambda m: f"{m[1]}{m[2]}{REDACTED}", text)
    text = _ASSIGNED.sub(_redacted_assignment, text)
    return _KNOWN.sub(REDACTED, _LOGIN.sub(REDACTED, text))


def _redacted_assignment(match: re.Match[str]) -> str:
    """`max_tokens=2048` and a bare `key=value` stay."""
    secret = _is_secret_in_query(match[1]) and not match[3].isdigit() and match[1].lower() != "key"
    return f"{match[1]}{match[2]}{REDACTED}" if secret else match[0]


def redacted_urls(text: str) -> str:
    """A text in which `user:password@` and `?token=...` of every URL are replaced, in its fragment as well."""
    return _URL.sub(lambda url: _redacted_url(url[0]), text) if "//" in text else text


def _redacted_url(url: str) -> str:
    shown = _USER_IN_URL.sub(REDACTED, url)
    return _QUERY_OF_URL.sub(lambda m: f"{m[1]}={REDACTED}" if _is_secret_in_query(m[1]) else m[0], shown)


def _is_secret_in_query(name: str) -> bool:
    name = unquote(name)
    words = {word.lower() for word in _WORD.findall(name)}
    return is_secret_name(name) or bool(words & _IN_QUERY and words.isdisjoint(_PLACES))


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
        if (shown := redacted_urls(text)) != text:
            raise ConfigError(
                f"{field}: {shown} carries a secret, which would be written into the run's files and messages. Leave "
                "it out of the URL and hand it over in an environment variable; a served reward names one in "
                "`token_variable`."
            )


def _texts(value: Any, field: str) -> list[tuple[str, str]]:
    """(dotted field, text) of every text in plain data."""
    if isinstance(value, Mapping):
        return [text for k, v in value.items() for text in _texts(v, f"{field}.{k}" if field else str(k))]
    if isinstance(value, list | tuple):
        return [text for i, item in enumerate(value) for text in _texts(item, f"{field}[{i}]")]
    return [(field, value)] if isinstance(value, str) else []
