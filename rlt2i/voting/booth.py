"""Between those who wait for votes and the page on which they are cast."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs

from rlt2i.runs.files import advice
from rlt2i.voting.ballot import Choice, open_pairs
from rlt2i.voting.folder import Slate, Vote, VoteFolder

FAREWELL_SECONDS = 2.0
"""For which a page is still served, so that it can say that it is not needed any more."""


@attrs.frozen(kw_only=True)
class Question:
    """Two images of a prompt, as they are shown.

    Attributes:
        name: of the question; an answer says which one it belongs to.
        prompt: what both images were to show.
        left, right: names of images. Which is which side is drawn by a hash, so that a preference for a side evens out,
            and is the same when it is asked again.
    """

    name: str
    prompt: str
    left: str
    right: str

    @classmethod
    def of(cls, prompt: str, one: str, other: str) -> Question:
        """The question about two images."""
        low, high = sorted((one, other))
        digest = hashlib.sha256(f"{low} {high} {prompt}".encode("utf-8", "backslashreplace")).hexdigest()
        left, right = (low, high) if int(digest[0], 16) % 2 else (high, low)
        return cls(name=digest[:16], prompt=prompt, left=left, right=right)


@attrs.define(eq=False)
class Booth:
    """Slates that wait for votes, the oldest first. Several threads may ask and vote.

    Attributes:
        folder: where the votes go.
        planned: prompts in all, where that is known.
    """

    folder: VoteFolder
    planned: int = 0
    _asked: list[Slate] = attrs.field(factory=list, init=False)
    _finished: int = attrs.field(default=0, init=False)
    _last: float = attrs.field(default=-math.inf, init=False)
    _looked: float = attrs.field(default=-math.inf, init=False)
    _over: str = attrs.field(default="", init=False)
    _trouble: str = attrs.field(default="", init=False)
    _changed: threading.Condition = attrs.field(factory=threading.Condition, init=False)

    def ask(self, slates: Sequence[Slate]) -> None:
        """Have these voted on, after those that wait already."""
        with self._changed:
            self._asked.extend(slates)
            self._changed.notify_all()

    def wait(self, slates: Sequence[Slate], *, patience_s: float = math.inf, undo_s: float = 0.0) -> bool:
        """Wait until nothing is left to ask about these slates, and return whether that is so.

        Args:
            patience_s: seconds without any vote after which it is given up.
            undo_s: seconds after the last vote in which it may be taken back.
        """
        since = time.monotonic()
        with self._changed:
            while not self._over:
                done = not any(self._open(slate) for slate in slates)
                left = undo_s - (time.monotonic() - self._last) if done else self._patience(since, patience_s)
                if left <= 0:
                    return done
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            return False

    def withdraw(self, slates: Sequence[Slate]) -> None:
        """Stop asking about these slates; their votes stay."""
        with self._changed:
            self._finished += len(slates)
            for slate in slates:
                self._asked.remove(slate)
            self._changed.notify_all()

    def wait_for_room(self, most: int) -> None:
        """Wait until fewer than `most` slates have something left to ask."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or sum(bool(self._open(s)) for s in self._asked) < most)

    def end(self, message: str) -> None:
        """Ask no more; the page shows the message."""
        with self._changed:
            self._over = message
            self._changed.notify_all()

    def linger(self, seconds: float) -> None:
        """Give an open page the time to ask once more, where one was open at all."""
        if time.monotonic() - self._looked < 2 * seconds:
            time.sleep(seconds)

    # ------------------------------------------------------------------------------------------------- of the page

    def vote(self, name: str, choice: Choice) -> bool:
        """Cast a vote; False when that is not the question that is asked now, or the disk refused it."""
        with self._changed:
            question = next(iter(self._questions(1)), None)
            if question is None or question.name != name or self._over:
                return False
            cast = partial(self.folder.cast, question.prompt, question.left, question.right, choice)
            return self._written(cast)

    def undo(self) -> bool:
        """Take back the last vote on a slate that still waits; False when there is none, or the disk refused it."""
        with self._changed:
            vote = self._undoable()
            if vote is None or self._over:
                return False
            return self._written(partial(self.folder.undo, vote))

    def state(self) -> dict[str, Any]:
        """What the page shows."""
        with self._changed:
            questions = self._questions(3)
            first = questions[0] if questions and not self._over else None
            finished = self._finished + sum(not self._open(slate) for slate in self._asked)
            return {
                "question": None if first is None else attrs.asdict(first),
                "soon": [name for q in questions[1:] for name in (q.left, q.right)],
                "finished": finished,
                "prompts": max(self.planned, self._finished + len(self._asked)),
                "votes": len(self.folder.votes),
                "complete": 0 < self.planned <= finished,
                "undo": not self._over and self._undoable() is not None,
                "over": self._over,
                "trouble": self._trouble,
            }

    def look(self) -> dict[str, Any]:
        """The state, for a page that is open."""
        self._looked = time.monotonic()
        return self.state()

    def shows(self, image: str) -> bool:
        """Whether an image belongs to a slate that waits."""
        with self._changed:
            return any(image in slate.images for slate in self._asked)

    # ----------------------------------------------------------------------------------------------------- helpers

    def _written(self, write: Callable[[], object]) -> bool:
        """Whether the disk took what was said; where it did not, the page says so and goes on asking."""
        self._trouble = ""
        try:
            write()
        except OSError as error:
            self._trouble = f"Not written: {error.strerror}. {advice(error, self.folder.path)} Then choose again."
        self._last = time.monotonic()
        self._changed.notify_all()
        return not self._trouble

    def _patience(self, since: float, patience_s: float) -> float:
        return patience_s - (time.monotonic() - max(since, self._last))

    def _open(self, slate: Slate) -> list[tuple[int, int]]:
        return open_pairs(slate.images, lambda one, other: self.folder.verdict(slate.prompt, one, other))

    def _questions(self, most: int) -> list[Question]:
        """The next ones, as far as they are known before the first is answered."""
        open_questions: list[Question] = []
        for slate in self._asked:
            for i, j in self._open(slate):
                open_questions.append(Question.of(slate.prompt, slate.images[i], slate.images[j]))
                if len(open_questions) == most:
                    return open_questions
        return open_questions

    def _undoable(self) -> Vote | None:
        waiting = [(slate.prompt, slate.images) for slate in self._asked]
        for vote in reversed(self.folder.votes):
            if any(vote.prompt == prompt and {vote.left, vote.right} <= set(images) for prompt, images in waiting):
                return vote
        return None
