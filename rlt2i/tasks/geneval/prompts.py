"""GenEval's prompts: the official 553, byte for byte, and others on the fly.

The official set is what `prompts/create_prompts.py --seed 43 -n 100` of github.com/djghosh13/geneval (MIT)
writes. The draws below ask NumPy's generator for the same numbers in the same order; `official_prompts`
checks the SHA-256 of the result, so a future NumPy with another stream is noticed. Odd plurals ("scissorses")
are the benchmark's own.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

import attrs
import numpy as np

from rlt2i.rewards.geneval_rules import CLASSES, COLOURS, RELATIONS, TAGS

OFFICIAL_SEED: Final = 43
OFFICIAL_SHA256: Final = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
"""Of the official evaluation_metadata.jsonl."""

NUMBERS: Final = {2: "two", 3: "three", 4: "four"}
_MIRROR: Final = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
Key = tuple[Any, ...]


@attrs.frozen(kw_only=True)
class GenEvalPrompt:
    """One sentence, what it asks for, and its phrases.

    Attributes:
        tag: one of GenEval's six categories.
        text: the sentence.
        metadata: the official record: tag, include, exclude (counting only) and prompt.
        core: objects with their colour, numbers and relations, as the sentence writes them.
        key: equal for prompts that ask for the same picture, whatever their order of words.
    """

    tag: str
    text: str
    metadata: Mapping[str, Any] = attrs.field(eq=False)
    core: tuple[str, ...]
    key: Key


def single_object(name: str) -> GenEvalPrompt:
    """a photo of a bench"""
    return _prompt("single_object", with_article(name), [_clause(name)], (name,), ("single_object", name))


def two_object(first: str, second: str) -> GenEvalPrompt:
    """a photo of a bench and a cow"""
    text = f"{with_article(first)} and {with_article(second)}"
    key = ("two_object", *sorted((first, second)))
    return _prompt("two_object", text, [_clause(first), _clause(second)], (first, second), key)


def counting(name: str, number: int) -> GenEvalPrompt:
    """a photo of three benches"""
    words = (NUMBERS[number], name + ("es" if name.endswith("s") else "s"))
    exclude = [_clause(name, number + 1)]
    return _prompt("counting", " ".join(words), [_clause(name, number)], words, ("counting", name, number), exclude)


def colours(name: str, colour: str) -> GenEvalPrompt:
    """a photo of a red bench"""
    phrase = f"{colour} {name}"
    clause = _clause(name, color=colour)
    return _prompt("colors", with_article(phrase), [clause], (phrase,), ("colors", name, colour))


def position(first: str, relation: str, second: str) -> GenEvalPrompt:
    """a photo of a bench left of a cow"""
    clauses = [_clause(second), _clause(first, position=[relation, 0])]
    text = f"{with_article(first)} {relation} {with_article(second)}"
    return _prompt("position", text, clauses, (first, relation, second), ("position", first, relation, second))


def colour_attribution(first: tuple[str, str], second: tuple[str, str]) -> GenEvalPrompt:
    """a photo of a red bench and a blue cow; arguments are (class, colour)"""
    phrases = tuple(f"{colour} {name}" for name, colour in (first, second))
    clauses = [_clause(name, color=colour) for name, colour in (first, second)]
    key = ("color_attr", *sorted((first, second)))
    return _prompt("color_attr", " and ".join(map(with_article, phrases)), clauses, phrases, key)


def with_article(phrase: str) -> str:
    """a bench, an orange: by the letter, as the benchmark does."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def draw(tag: str, rng: np.random.Generator) -> GenEvalPrompt:
    """One random prompt of a category, with the official order of draws. No coloured persons."""
    kinds = len(CLASSES)
    if tag == "single_object":
        return single_object(CLASSES[rng.choice(kinds)])
    if tag == "two_object":
        a, b = rng.choice(kinds, size=2, replace=False)
        return two_object(CLASSES[a], CLASSES[b])
    if tag == "counting":
        a = rng.choice(kinds)
        return counting(CLASSES[a], int(rng.integers(2, 4, endpoint=True)))
    if tag == "colors":
        a = rng.choice(kinds - 1) + 1
        return colours(CLASSES[a], COLOURS[rng.choice(len(COLOURS))])
    if tag == "position":
        a, b = rng.choice(kinds, size=2, replace=False)
        return position(CLASSES[a], RELATIONS[rng.choice(len(RELATIONS))], CLASSES[b])
    assert tag == "color_attr", tag
    a, b = rng.choice(kinds - 1, size=2, replace=False) + 1
    c, d = rng.choice(len(COLOURS), size=2, replace=False)
    return colour_attribution((CLASSES[a], COLOURS[c]), (CLASSES[b], COLOURS[d]))


@functools.cache
def official_prompts() -> tuple[GenEvalPrompt, ...]:
    """The 553 prompts of the benchmark in their order.

    Raises:
        RuntimeError: when this NumPy draws other numbers than the one that the benchmark was made with.
    """
    rng = np.random.default_rng(OFFICIAL_SEED)
    drawn = [single_object(CLASSES[i]) for i in rng.choice(len(CLASSES), size=len(CLASSES), replace=False)]
    for tag in TAGS[1:]:
        drawn += [draw(tag, rng) for _ in range(100)]
    unique = tuple({p.text: p for p in drawn}.values())
    digest = hashlib.sha256(to_jsonl(unique).encode()).hexdigest()
    if digest != OFFICIAL_SHA256:
        raise RuntimeError(
            f"official_prompts: NumPy {np.__version__} gives SHA-256 {digest[:12]}..., the official GenEval "
            f"prompts have {OFFICIAL_SHA256[:12]}.... Its random stream has changed; use NumPy 1.26 to 2.4."
        )
    return unique


def to_jsonl(prompts: tuple[GenEvalPrompt, ...]) -> str:
    """The official file format: one JSON record per line."""
    return "".join(json.dumps(p.metadata) + "\n" for p in prompts)


def mirrored(key: Key) -> Key:
    """The key of the same picture said the other way round: "A left of B" for "B right of A"."""
    if key[0] != "position":
        return key
    _, first, relation, second = key
    return ("position", second, _MIRROR[relation], first)


@functools.cache
def held_out_keys() -> frozenset[Key]:
    """What training must not ask for: the official prompts in either order of words, also mirrored."""
    keys = {p.key for p in official_prompts()}
    return frozenset(keys | {mirrored(key) for key in keys})


def _clause(name: str, count: int = 1, **extra: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **extra}


def _prompt(
    tag: str,
    what: str,
    include: list[dict[str, Any]],
    core: tuple[str, ...],
    key: Key,
    exclude: list[dict[str, Any]] | None = None,
) -> GenEvalPrompt:
    text = f"a photo of {what}"
    metadata = {"tag": tag, "include": include, **({"exclude": exclude} if exclude else {}), "prompt": text}
    return GenEvalPrompt(tag=tag, text=text, metadata=metadata, core=core, key=key)
