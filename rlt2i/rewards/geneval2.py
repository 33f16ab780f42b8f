"""Soft-TIFA, the score of GenEval 2: a judge answers one atomic question after the other about the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import attrs
from attrs import validators

from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.rewards.judge import FIRST_TOKEN, Answer, Judge, data_url, first_words

NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""Numbers that count the same as a word and as digits."""
SKILLS: Final = ("object", "count", "attribute", "position", "verb")
"""What the questions of the benchmark ask about."""


def spellings(answer: str) -> frozenset[str]:
    """The first words that say an answer: four and 4, but not fourteen.

    Raises:
        ValueError: for an answer of more than one word, whose first token says nothing.
    """
    word = answer.strip().strip(".").lower()
    if not word.isalnum() or not word.isascii():
        raise ValueError(f"the answer {answer!r} is no single word")
    if word in NUMBERS:
        return frozenset({word, str(NUMBERS.index(word))})
    if word.isdigit() and int(word) < len(NUMBERS):
        return frozenset({word, NUMBERS[int(word)]})
    return frozenset({word})


def rivals(answer: str) -> frozenset[str] | None:
    """All answers that such a question can have, its own among them; None where that is open."""
    right = spellings(answer)
    for kind in (frozenset({"yes", "no"}), frozenset(NUMBERS) | frozenset(map(str, range(len(NUMBERS))))):
        if right <= kind:
            return kind
    return None


@attrs.frozen(kw_only=True)
class GenEval2Reward(Judge):
    """Mean probability of the right answers to the atomic questions about a prompt, in [0, 1].

    Each question is asked on its own; its score is the probability that the first token of the answer is the right
    one, in any spelling. `mean: geometric` is the benchmark's estimate for whole prompts (GM): one wrong atom spoils
    it. `arithmetic` is its estimate for atoms (AM), with a gentler slope for training. Both are components, and so is
    the mean of each skill that was asked about. A token that is not among the 20 likeliest counts as probability 0,
    where the authors, who hold the whole distribution, count what little it has. An image is invalid when any of its
    questions could not be asked, or was answered with none of the possible answers: a judge that stumbles must not look
    like a bad image.

    The authors judge with Qwen3-VL-8B-Instruct; scores of different judges cannot be compared. Prompts carry
    `vqa_list`, pairs of question and answer, and may carry `skills`, one for each question: GenEval 2's own
    (`PublishedPrompts(set="geneval2")`, for evaluation alone), `GenEvalTask(questions=True)`, or a JSON-lines file of
    yours. Kamath et al. 2025, arXiv:2512.16853.

    Attributes:
        mean: which of the two is the score.
        asks: what is asked; {question} stands for the question.
        min_mass: least probability that the possible answers to a question have together.
    """

    span = (0.0, 1.0)

    mean: Literal["geometric", "arithmetic"] = attrs.field(
        default="geometric", validator=validators.in_(("geometric", "arithmetic"))
    )
    asks: str = attrs.field(
        default="{question} Answer in one word.", validator=validators.matches_re(r"(?s).*\{question\}.*")
    )
    min_mass: float = attrs.field(default=0.01, validator=[validators.ge(0.0), validators.le(1.0)])

    @property
    def metadata_keys(self) -> frozenset[str]:
        return frozenset({"vqa_list"})

    def options(self) -> dict[str, Any]:
        return dict(FIRST_TOKEN)

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        images = batch.images.permute(0, 2, 3, 1).cpu().numpy()
        questions: list[tuple[int, str, str, str]] = []
        wrong: dict[int, str] = {}
        for row, metadata in enumerate(batch.metadata):
            try:
                pairs = geneval2_questions(metadata)
            except ValueError as error:
                wrong[row] = str(error)
                continue
            picture = data_url(images[row])
            questions.extend((row, picture, question, answer) for question, answer in pairs)
        answers = self._at_once(self._ask_one, questions)
        answers_of_row: dict[int, list[Answer]] = {}
        for (row, *_), answer in zip(questions, answers, strict=True):
            answers_of_row.setdefault(row, []).append(answer)
        judged = [
            Answer(error=wrong[row]) if row in wrong else self._combine(answers_of_row[row], metadata)
            for row, metadata in enumerate(batch.metadata)
        ]
        return self._output(judged)

    def _ask_one(self, row: tuple[int, str, str, str]) -> Answer:
        _, picture, question, answer = row
        return self._ask(
            picture, self.asks.replace("{question}", question), lambda choice: self._read_answer(choice, answer)
        )

    def _read_answer(self, choice: Mapping[str, Any], answer: str) -> Answer:
        words, possible = first_words(choice), rivals(answer)
        if possible is not None:
            mass = sum(words.get(word, 0.0) for word in possible)
            if not mass > self.min_mass:
                raise ValueError(f"an answer like {answer!r} has probability {mass:.3g} (min_mass={self.min_mass:g})")
        return Answer(score=min(1.0, sum(words.get(word, 0.0) for word in spellings(answer))))

    def _combine(self, answers: Sequence[Answer], metadata: Mapping[str, Any]) -> Answer:
        said = " / ".join(answer.said for answer in answers)
        errors = [answer.error for answer in answers if answer.error is not None]
        if errors:
            return Answer(said=said, error=f"{len(errors)} of {len(answers)} questions: {errors[0]}"[:500])
        chances = [answer.score for answer in answers]
        means = {"geometric": geometric_mean(chances), "arithmetic": sum(chances) / len(chances)}
        skills = metadata.get("skills")
        components = dict(means)
        if isinstance(skills, list | tuple) and len(skills) == len(chances):
            for skill in dict.fromkeys(map(str, skills)):
                own = [chance for chance, other in zip(chances, skills, strict=True) if str(other) == skill]
                components[skill] = sum(own) / len(own)
        return Answer(score=means[self.mean], components=components, said=said)


def geometric_mean(chances: Sequence[float]) -> float:
    """exp of the mean logarithm; 0 when any is 0."""
    return 0.0 if min(chances) <= 0 else math.exp(math.fsum(map(math.log, chances)) / len(chances))


def geneval2_questions(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a prompt.

    Raises:
        ValueError: when there are none, or one is no pair of texts with an answer of one word.
    """
    pairs = metadata.get("vqa_list")
    if not isinstance(pairs, list | tuple) or not pairs:
        raise ValueError(f"vqa_list is {pairs!r}; expected a list of [question, answer]")
    questions = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(t, str) and t for t in pair):
            raise ValueError(f"vqa_list holds {pair!r}; expected [question, answer]")
        spellings(pair[1])
        questions.append((pair[0], pair[1]))
    return questions
