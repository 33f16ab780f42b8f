"""A suite: which prompts, how many images of each, from which noise, and who judges them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs
from attrs.validators import ge, in_, min_len, optional

from rlt2i.interfaces import Reward
from rlt2i.tasks.base import Task, TaskPrompt
from rlt2i.tasks.streams import balanced
from rlt2i.types import ImageSize, at_least_a_pixel, image_size

PIXELS = "pixels"
"""Name of the features that need no weights: 16 x 16 averaged pixels."""


@attrs.frozen(kw_only=True)
class Suite:
    """A measurement that can be repeated: the same prompts, noise and judges for every policy.

    Attributes:
        name: of the suite; folders start with it.
        about: one line for `rlt2i eval --help` and the report.
        version: counts up when numbers can no longer be compared with earlier ones.
        task: whose held-out prompts.
        prompts: how many of them to ask the task for; a prompt that comes twice counts once.
        images_per_prompt: drawn from different noise.
        rewards: name -> what judges the images. More can be added to saved images later.
        headline: the number that the suite is known by: a reward, or reward/component.
        overall: "images" is the mean over all images; "categories" the mean of the categories' means, as in GenEval.
        steps: of the ODE, or null for those of the recipe's own evaluation. Guidance is always the policy's.
        image_size: in pixels, one number for a square or [height, width], or null for that of the recipe.
        seed: of the noise.
        features: what diversity is measured in: "pixels", or a vision transformer of timm by name or folder.
    """

    name: str = attrs.field()
    about: str = ""
    version: int = attrs.field(default=1, validator=ge(1))
    task: Task
    prompts: int = attrs.field(validator=ge(1))
    images_per_prompt: int = attrs.field(default=1, validator=ge(1))
    rewards: Mapping[str, Reward] = attrs.field(validator=min_len(1))
    headline: str = attrs.field()
    overall: Literal["images", "categories"] = attrs.field(default="images", validator=in_(("images", "categories")))
    steps: int | None = attrs.field(default=None, validator=optional(ge(1)))
    image_size: ImageSize | None = attrs.field(default=None, converter=image_size, validator=at_least_a_pixel)
    seed: int = attrs.field(default=0, validator=ge(0))
    features: str = attrs.field(default=PIXELS, validator=min_len(1))

    @name.validator
    def _check_name(self, _: Any, value: str) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", value):
            raise ValueError(f"Suite(name={value!r}): folders start with it; use lower-case letters, digits, '.-_'.")

    @rewards.validator
    def _check_rewards(self, _: Any, value: Mapping[str, Reward]) -> None:
        for name in value:
            check_reward_name(name)

    @headline.validator
    def _check_headline(self, _: Any, value: str) -> None:
        if value.split("/")[0] not in self.rewards:
            raise ValueError(
                f"Suite(headline={value!r}): no reward of the suite is called {value.split('/')[0]!r}. Name one of "
                f"{', '.join(self.rewards)}, or one of its components as reward/component."
            )

    def chosen_prompts(self, count: int | None = None) -> list[TaskPrompt]:
        """The distinct prompts, or `count` of them taken from the categories in turn.

        Raises:
            ValueError: when there are fewer than `count`.
        """
        requested = list({prompt.text: prompt for prompt in self.task.eval_prompts(self.prompts)}.values())
        if count is None or count == len(requested):
            return requested
        if not 1 <= count <= len(requested):
            raise ValueError(
                f"--prompts {count}: suite {self.name!r} has {len(requested)} prompts; use 1 to {len(requested)}."
            )
        # A few of them stand for all the others, so that intervals are over prompts.
        return [attrs.evolve(prompt, fixed=False) for prompt in balanced(requested, count, of=f"suite {self.name!r}")]


@attrs.frozen(kw_only=True)
class Drawing:
    """One image of a suite.

    Attributes:
        id: "<number of the prompt>-<index>", the name of its file.
        number: of the prompt.
        index: of the image among those of its prompt.
        prompt: what it shows.
    """

    id: str
    number: int
    index: int
    prompt: TaskPrompt


def drawing_id(number: int, index: int) -> str:
    """00012-03: prompt 12, image 3."""
    return f"{number:05d}-{index:02d}"


def drawings(prompts: Sequence[TaskPrompt], images_per_prompt: int) -> list[Drawing]:
    """All images of a suite, prompt by prompt."""
    return [
        Drawing(id=drawing_id(number, index), number=number, index=index, prompt=prompt)
        for number, prompt in enumerate(prompts)
        for index in range(images_per_prompt)
    ]


def prompts_sha256(prompts: Sequence[TaskPrompt]) -> str:
    """SHA-256 over texts, categories and task data of the prompts, in order."""
    digest = hashlib.sha256()
    for line in _lines(prompts):
        digest.update(line.encode())
    return digest.hexdigest()


def _lines(prompts: Sequence[TaskPrompt]) -> Iterator[str]:
    for p in prompts:
        yield json.dumps([p.text, p.category, dict(p.metadata)], sort_keys=True, ensure_ascii=False) + "\n"


def check_reward_name(name: str) -> None:
    """Refuse a name that cannot be part of file names and metrics.

    Raises:
        ValueError: saying which characters there may be.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"reward name {name!r}: files and metrics bear it; use letters, digits, '_', '.' and '-'.")
