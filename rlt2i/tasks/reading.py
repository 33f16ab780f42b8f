"""What a policy reads of its prompts: which are cut at a token limit, and which core phrases no prompt says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import attrs

from rlt2i.inputs.phrases import find_phrase
from rlt2i.inputs.quotes import quoted_texts
from rlt2i.inputs.typography import is_invisible
from rlt2i.interfaces import Policy
from rlt2i.tasks.base import TaskPrompt

EXAMPLES: Final = 5
"""How many prompts a report names."""
MOST_DRAWN: Final = 50_000
"""Training prompts that are looked at before a run; a longer stream is not drawn to its end."""


@attrs.frozen(kw_only=True)
class CutPrompt:
    """A prompt that is longer than a text stream reads.

    Attributes:
        text: the prompt.
        kept: its characters before the cut.
        lost: its core phrases and quoted texts that end behind the cut.
    """

    text: str
    kept: int
    lost: tuple[str, ...]


@attrs.frozen(kw_only=True)
class PromptReport:
    """What was found about a set of prompts.

    Attributes:
        prompts: how many distinct ones were looked at.
        cut: text stream -> the prompts that it does not read to their end.
        limits: text stream -> its tokens for the longest of those prompts, special ones included.
        unsaid: (phrase, prompt) for every core phrase that its prompt does not say.
    """

    prompts: int
    cut: Mapping[str, tuple[CutPrompt, ...]]
    limits: Mapping[str, int]
    unsaid: tuple[tuple[str, str], ...]

    def lines(self) -> list[str]:
        """What a user should know, one line a matter; empty when all is well."""
        lines = []
        for stream, cuts in self.cut.items():
            lines.append(
                f"prompts longer than the {self.limits[stream]} tokens that the text encoder {stream!r} reads, so that "
                f"their ends are cut off: {len(cuts)} of {self.prompts}"
            )
            if losing := [cut for cut in cuts if cut.lost]:
                lost = [f"{', '.join(map(repr, cut.lost))} of {_short(cut.text)}" for cut in losing]
                lines.append(f"core or quoted text behind that cut, so put what matters first: {_some(lost)}")
        if self.unsaid:
            unsaid = [f"{phrase!r} in {_short(text)}" for phrase, text in self.unsaid]
            lines.append(
                f"core phrases that their prompts do not say, so that no map starts from them: {_some(unsaid)}"
            )
        return lines


def report_on(policy: Policy, prompts: Iterable[TaskPrompt]) -> PromptReport:
    """What a policy reads of the distinct prompts among these.

    Args:
        policy: any; one that cannot tell its tokens apart reports no cut.
        prompts: of a task.
    """
    distinct = list({(prompt.text, prompt.core): prompt for prompt in prompts}.values())
    cut: dict[str, list[CutPrompt]] = {}
    limits: dict[str, int] = {}
    unsaid: list[tuple[str, str]] = []
    for prompt in distinct:
        places = {phrase: find_phrase(phrase, prompt.text) for phrase in prompt.core}
        unsaid += [(phrase, prompt.text) for phrase, where in places.items() if not where]
        for stream, (_, ranges) in policy.text_streams(prompt.text).items():
            kept = max((end for _, end in ranges), default=0)
            if kept < _visible_end(prompt.text):
                lost = tuple(dict.fromkeys(_lost(prompt.text, places, kept)))
                cut.setdefault(stream, []).append(CutPrompt(text=prompt.text, kept=kept, lost=lost))
                limits[stream] = max(limits.get(stream, 0), len(ranges))
    return PromptReport(
        prompts=len({prompt.text for prompt in distinct}),
        cut={stream: tuple({one.text: one for one in cuts}.values()) for stream, cuts in cut.items()},
        limits=limits,
        unsaid=tuple(unsaid),
    )


def _lost(text: str, places: Mapping[str, Sequence[tuple[int, int]]], kept: int) -> Iterator[str]:
    """Core phrases, then quoted texts, of which no occurrence ends before the cut."""
    for phrase, where in places.items():
        if where and min(end for _, end in where) > kept:
            yield phrase
    for quote in quoted_texts(text):
        if quote.end - 1 > kept:
            yield quote.text


def _visible_end(text: str) -> int:
    return max((i + 1 for i, sign in enumerate(text) if not sign.isspace() and not is_invisible(sign)), default=0)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}")


def _some(texts: Sequence[str]) -> str:
    named = "; ".join(texts[:EXAMPLES])
    return f"{len(texts)}, such as {named}" if len(texts) > EXAMPLES else named
