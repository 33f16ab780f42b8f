"""A curriculum over prompts: what taught nothing lately rests for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch
from attrs.validators import ge, le, lt
from torch import Tensor

from rlt2i.functional.groups import tied
from rlt2i.seeds import generator
from rlt2i.tasks.base import TaskPrompt

LOOKED_AT = 8
"""Prompts of the stream looked at for each one that is needed; beyond them those that rest are taken after all."""

Stream = Callable[[int, int], list[TaskPrompt]]
"""(start, count) -> prompts of the endless training stream."""


@attrs.frozen(kw_only=True)
class PromptCurriculum:
    """Prompts whose groups had no spread rest: their advantages are 0, so their rollouts cost and teach nothing.

    DAPO's dynamic sampling (arXiv 2503.14476) throws such groups away after they were rolled out; here the prompt is
    passed over when the stream comes to it again, before anything is rolled out, and the next one takes its place. That
    changes which prompts are trained on, towards those that are neither solved nor hopeless.

    Attributes:
        rest: iterations for which a prompt rests after its group had no spread.
        keep: probability of taking a prompt that rests all the same: 0 drops it, anything between weights it down, so
            that one which has become learnable is noticed earlier.
    """

    rest: int = attrs.field(default=10, validator=ge(1))
    keep: float = attrs.field(default=0.0, validator=[ge(0), le(1), lt(1)])


@attrs.frozen(kw_only=True)
class Chosen:
    """Prompts of one iteration.

    Attributes:
        prompts: in the order of the stream.
        places: of each in the stream, which make their seeds.
        passed_over: prompts of the stream that were left out.
    """

    prompts: list[TaskPrompt]
    places: list[int]
    passed_over: int = 0


@attrs.define
class CurriculumState:
    """Where a run stands in its stream, and which prompts rest; the same on every process.

    Attributes:
        curriculum: None takes the stream as it comes.
        place: in the stream, of the next prompt to look at.
        rests_until: text -> the first iteration in which it is taken again.
    """

    curriculum: PromptCurriculum | None = None
    place: int = 0
    rests_until: dict[str, int] = attrs.field(factory=dict)

    def choose(self, stream: Stream, *, count: int, iteration: int, seed: int) -> Chosen:
        """The prompts of iteration number `iteration`; asking twice gives the same.

        Args:
            count: of prompts.
            iteration: finished before this one.
            seed: of the run, for what is kept by chance.
        """
        if self.curriculum is None:
            first = iteration * count
            return Chosen(prompts=stream(first, count), places=list(range(first, first + count)))
        taken: list[tuple[int, TaskPrompt]] = []
        resting: list[tuple[int, TaskPrompt]] = []
        for start in range(self.place, self.place + LOOKED_AT * count, count):
            for place, prompt in enumerate(stream(start, count), start):
                if len(taken) < count:
                    (resting if self._rests(prompt, place, iteration, seed) else taken).append((place, prompt))
            if len(taken) == count:
                break
        needed = count - len(taken)  # all that were looked at rest: better a dull prompt than none
        taken = sorted([*taken, *resting[:needed]], key=lambda pair: pair[0])
        return Chosen(
            prompts=[prompt for _, prompt in taken],
            places=[place for place, _ in taken],
            passed_over=len(resting[needed:]),
        )

    def learned(self, chosen: Chosen, without_spread: Iterable[str], *, iteration: int) -> None:
        """Take note of what an iteration has shown.

        Args:
            chosen: what it was trained on.
            without_spread: texts of the groups in which all rewards were equal, of all processes.
            iteration: its number, as in `choose`.
        """
        if self.curriculum is None:
            return
        dull = set(without_spread)
        self.place = self.place + len(chosen.places) + chosen.passed_over
        for prompt in chosen.prompts:
            self.rests_until.pop(prompt.text, None)
        self.rests_until = {text: until for text, until in self.rests_until.items() if until > iteration + 1}
        self.rests_until |= dict.fromkeys(sorted(dull), iteration + 1 + self.curriculum.rest)

    def metrics(self, chosen: Chosen) -> dict[str, float]:
        """For the log; nothing without a curriculum."""
        if self.curriculum is None:
            return {}
        return {
            "curriculum/resting": float(len(self.rests_until)),
            "curriculum/passed_over": float(chosen.passed_over),
        }

    def state(self) -> dict[str, Any]:
        """JSON-able; empty without a curriculum."""
        return {} if self.curriculum is None else {"place": self.place, "rests_until": self.rests_until}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.place = int(state.get("place", 0))
        self.rests_until = {str(text): int(until) for text, until in state.get("rests_until", {}).items()}

    def _rests(self, prompt: TaskPrompt, place: int, iteration: int, seed: int) -> bool:
        if self.rests_until.get(prompt.text, 0) <= iteration:
            return False
        assert self.curriculum is not None
        drawn = torch.rand((), generator=generator("curriculum", seed, place))
        return float(drawn) >= self.curriculum.keep


def texts_without_spread(texts: Iterable[str], rewards: Tensor, valid: Tensor, group_size: int) -> list[str]:
    """The prompts in whose groups all valid rewards are equal up to rounding; groups without a valid one say nothing.

    Args:
        texts: of the P groups.
        rewards, valid: [P x G] on the host.
    """
    mask = valid.view(-1, group_size)
    dull = tied(rewards.view(-1, group_size), mask)[:, 0] & mask.any(dim=1)
    return [text for text, flag in zip(texts, dull.tolist(), strict=True) if flag]
