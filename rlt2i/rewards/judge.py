"""Vision-language models as judges, through any OpenAI-compatible endpoint (vLLM, sglang, a hosted one).

An answer that cannot be understood is invalid, never 0: a judge that stumbles must not look like a bad image.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from attrs import validators
from PIL import Image

from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.rewards.batching import REASON, configuration
from rlt2i.rewards.http import RequestFailed, bearer, exchange, http_client, send
from rlt2i.rewards.rubrics import RUBRICS, Rubric, RubricName

if TYPE_CHECKING:
    import httpx

VQASCORE = 'Does this figure show "{prompt}"? Please answer yes or no.'
"""The question of VQAScore (Lin et al. 2024, arXiv 2404.01291)."""


MAX_ANSWER = 4 << 20
"""Bytes."""


@attrs.frozen(kw_only=True)
class Endpoint:
    """An OpenAI-compatible server.

    Attributes:
        url: up to and including its version, for example http://127.0.0.1:8000/v1.
        model: the name under which the server knows it.
        key_variable: environment variable with the API key; empty sends none.
        concurrency: requests at a time.
        timeout_s: seconds for one answer.
        patience_s: seconds over which a busy or restarting server is asked again.
    """

    url: str = attrs.field(default="http://127.0.0.1:8000/v1", validator=validators.matches_re(r"https?://.+"))
    model: str
    key_variable: str = ""
    concurrency: int = attrs.field(default=16, validator=validators.ge(1))
    timeout_s: float = attrs.field(default=120.0, validator=validators.gt(0))
    patience_s: float = attrs.field(default=120.0, validator=validators.ge(0))


@attrs.frozen(kw_only=True)
class Answer:
    """The judge's view of one image; `error` says why there is none."""

    score: float = math.nan
    components: Mapping[str, float] = attrs.field(factory=dict)
    said: str = ""
    error: str | None = None


@attrs.frozen(kw_only=True)
class Judge(Reward):
    """Asks a vision-language model behind an endpoint; what is asked, and what is made of it, differs.

    Attributes:
        endpoint: where the judge runs.
    """

    endpoint: Endpoint
    _clients: list[Any] = attrs.field(init=False, factory=list, eq=False, repr=False)

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Sampling options of the request."""

    def networks(self) -> Mapping[str, int | None]:
        return {}

    def _output(self, answers: Sequence[Answer]) -> RewardOutput:
        """One answer for each image."""
        names = dict.fromkeys(name for answer in answers for name in answer.components)
        return RewardOutput(
            scores=torch.tensor([answer.score for answer in answers]),
            valid=torch.tensor([answer.error is None for answer in answers]),
            components={n: torch.tensor([a.components.get(n, math.nan) for a in answers]) for n in names},
            info=[{"said": a.said} if a.error is None else {"said": a.said, REASON: a.error} for a in answers],
        )

    def _at_once(self, ask: Callable[..., Answer], *values: Iterable[Any]) -> list[Answer]:
        """What `ask` makes of each row of values, as many requests at a time as the endpoint takes."""
        self._client()  # made here, so that no two threads make one
        with ThreadPoolExecutor(self.endpoint.concurrency, thread_name_prefix="judge") as threads:
            return list(threads.map(ask, *values))

    def fingerprint(self) -> dict[str, Any]:
        return configuration(self, without=("endpoint",), model=self.endpoint.model)

    def close(self) -> None:
        while self._clients:
            self._clients.pop().close()

    def _client(self) -> httpx.Client:
        if not self._clients:
            headers = bearer(self.endpoint.key_variable)
            self._clients.append(
                http_client(self.endpoint.timeout_s, connections=self.endpoint.concurrency, headers=headers)
            )
        return self._clients[0]

    def _ask(self, image: str, question: str, read: Callable[[Mapping[str, Any]], Answer]) -> Answer:
        """One question about an image (a data URL), and what `read` finds in the choice that comes back."""
        client = self._client()
        body = {
            "model": self.endpoint.model,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": image}},
                        {"type": "text", "text": question},
                    ],
                }
            ],
            **self.options(),
        }
        url, content = f"{self.endpoint.url.rstrip('/')}/chat/completions", json.dumps(body).encode()
        ask = lambda: exchange(
            client,
            "POST",
            url,
            content=content,
            headers={"content-type": "application/json"},
            timeout_s=self.endpoint.timeout_s,
            max_bytes=MAX_ANSWER,
        )
        try:
            reply = send(ask, patience_s=self.endpoint.patience_s)
        except RequestFailed as error:
            return Answer(error=f"the judge at {self.endpoint.url} did not answer: {error}")
        said = ""
        try:
            choice = json.loads(reply.body)["choices"][0]
            said = str(choice["message"]["content"] or "")[:2000]
            return attrs.evolve(read(choice), said=said)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            return Answer(said=said, error=f"the judge's answer could not be read: {error!r}"[:500])


@attrs.frozen(kw_only=True)
class OneQuestion(Judge):
    """Sends each image with a question about its prompt to a judge and reads a number out of the answer."""

    @abstractmethod
    def question(self, prompt: str) -> str:
        """The text that goes with the image."""

    @abstractmethod
    def read(self, choice: Mapping[str, Any]) -> Answer:
        """The score in one choice of a chat completion; may raise KeyError, TypeError or ValueError."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        images = batch.images.permute(0, 2, 3, 1).cpu().numpy()
        ask = lambda image, prompt: self._ask(data_url(image), self.question(prompt), self.read)
        answers = self._at_once(ask, images, batch.prompts)
        return self._output(answers)


@attrs.frozen(kw_only=True)
class YesNoJudge(OneQuestion):
    """P(yes) / (P(yes) + P(no)) of the first token, in [0, 1]: deterministic, cheap and smooth.

    With the default question this is VQAScore with a judge of your choice. Tokens that differ in case or
    spaces count together. An answer in which neither is among the likeliest tokens, or both together are
    unlikely, is invalid. Components: `yes`, `no`, the probabilities.

    Attributes:
        asks: the question; {prompt} stands for the prompt.
        min_mass: least P(yes) + P(no).
    """

    span = (0.0, 1.0)

    asks: str = attrs.field(default=VQASCORE, validator=validators.matches_re(r"(?s).*\{prompt\}.*"))
    min_mass: float = attrs.field(default=0.01, validator=[validators.ge(0.0), validators.le(1.0)])

    def question(self, prompt: str) -> str:
        return self.asks.replace("{prompt}", prompt)

    def options(self) -> dict[str, Any]:
        return dict(FIRST_TOKEN)

    def read(self, choice: Mapping[str, Any]) -> Answer:
        words = first_words(choice)
        probabilities = {word: words.get(word, 0.0) for word in ("yes", "no")}
        mass = probabilities["yes"] + probabilities["no"]
        if not mass > self.min_mass:
            raise ValueError(f"P(yes) + P(no) = {mass:.3g}, which is no answer (min_mass={self.min_mass:g})")
        return Answer(score=probabilities["yes"] / mass, components=probabilities)


@attrs.frozen(kw_only=True)
class RubricJudge(OneQuestion):
    """The mean of the marks that the judge writes, in the unit of the rubric (UnifiedReward: 1 to 5).

    A mark that is missing, or outside the rubric's range, makes the sample invalid. Components: every mark.
    To bring the score to [0, 1], put it into `Affine`.

    Attributes:
        rubric: name of a preset ("unified-reward", "unified-reward-2", "alignment"), or a rubric of your own.
        temperature: 0 makes the judge deterministic.
        max_tokens: of the answer; one that is cut off has no marks.
    """

    rubric: RubricName | Rubric = attrs.field(default="unified-reward-2")
    temperature: float = attrs.field(default=0.0, validator=validators.ge(0.0))
    max_tokens: int = attrs.field(default=1024, validator=validators.ge(1))

    @rubric.validator
    def _check_rubric(self, _: Any, value: str | Rubric) -> None:
        if isinstance(value, str) and value not in RUBRICS:
            raise ValueError(f"RubricJudge(rubric={value!r}): unknown. Use one of {', '.join(RUBRICS)}, or a Rubric.")

    @property
    def _rubric(self) -> Rubric:
        return RUBRICS[self.rubric] if isinstance(self.rubric, str) else self.rubric

    @property
    def span(self) -> tuple[float, float]:
        return self._rubric.low, self._rubric.high

    def question(self, prompt: str) -> str:
        return self._rubric.instructions.replace("{prompt}", prompt)

    def options(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "temperature": self.temperature}

    def read(self, choice: Mapping[str, Any]) -> Answer:
        marks = self._rubric.marks_in(str(choice["message"]["content"]))
        return Answer(score=sum(marks.values()) / len(marks), components=marks)


FIRST_TOKEN: Mapping[str, Any] = MappingProxyType(
    {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
)
"""Options of a request for the probabilities of one token."""


def first_words(choice: Mapping[str, Any]) -> dict[str, float]:
    """Word -> probability of being the first token of the answer; spellings that differ in case, spaces or punctuation
    count together. Of what is not among the likeliest tokens nothing is known, so it is not there.

    Raises:
        KeyError, IndexError, TypeError, ValueError: when the choice holds no log-probabilities.
    """
    probabilities: dict[str, float] = {}
    for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
        word = re.sub(r"[^a-z0-9]", "", str(entry["token"]).lower())
        probabilities[word] = probabilities.get(word, 0.0) + math.exp(min(0.0, float(entry["logprob"])))
    return probabilities


def data_url(image: np.ndarray) -> str:
    """[H, W, 3] uint8 RGB as a lossless PNG in a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
