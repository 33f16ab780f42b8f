"""What a task supplies: an endless, seeded stream of training prompts and a fixed set of held-out prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import attrs

from rlt2i.inputs.textfiles import refuse_surrogates
from rlt2i.interfaces import Reward, Sampler
from rlt2i.types import ImageSize, Prompts


@attrs.frozen(kw_only=True)
class TaskPrompt:
    """One prompt of a task.

    Attributes:
        text: what the policy reads.
        metadata: JSON-able data that the reward needs.
        core: the phrases the user cares about; empty means the content words.
        category: for tables.
        fixed: of a held-out prompt: it is one of all there are of its category, so that an interval is over the images
            of these very prompts and not over prompts that might have been drawn instead. A list that is cut short must
            hold each prompt once.
        trained_on: of a held-out prompt: it is among the training prompts too, so that it tells how well they were
            learned and not how well that carries over.

    Raises:
        ValueError: for text that holds half of a character (a lone surrogate), which no tokenizer takes.
    """

    text: str
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    core: tuple[str, ...] = ()
    category: str = "all"
    fixed: bool = False
    trained_on: bool = False

    def __attrs_post_init__(self) -> None:
        refuse_surrogates((self.text, self.core, self.category, self.metadata), "prompt")


class Task(ABC):
    """A source of prompts. Held-out prompts are never trained on."""

    @property
    @abstractmethod
    def provides(self) -> frozenset[str]:
        """The metadata keys that every prompt carries."""

    @abstractmethod
    def train_prompts(self, *, seed: int, start: int, count: int) -> list[TaskPrompt]:
        """Prompts number `start` to `start + count` of the endless training stream of `seed`."""

    @abstractmethod
    def eval_prompts(self, count: int) -> list[TaskPrompt]:
        """`count` held-out prompts, balanced over categories; the same list on every call."""

    def further_files(self) -> Sequence[Path]:
        """Files that are named within the files of the task's fields: their content belongs to a run as well."""
        return ()

    def check_image_size(self, image_size: ImageSize) -> None:  # noqa: B027 - most tasks go with every size
        """Refuse a size (`train.image_size` or one of `train.sizes`) that the task's images cannot have.

        Raises:
            ValueError: saying which size to use.
        """


def as_prompts(prompts: list[TaskPrompt], *, group_size: int, start: int = 0) -> Prompts:
    """Prompts record of consecutive draws."""
    return Prompts(
        texts=tuple(p.text for p in prompts),
        group_size=group_size,
        metadata=tuple(p.metadata for p in prompts),
        core=tuple(p.core for p in prompts),
        draws=tuple(range(start, start + len(prompts))),
    )


def _check_keys(part: Reward | Sampler) -> None:
    """What a part written elsewhere may get wrong, and what would then silently not be checked."""
    keys: object = part.metadata_keys
    name = type(part).__name__
    if isinstance(keys, str) or not isinstance(keys, Set) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{name}.metadata_keys={keys!r}: expected a set of names, such as frozenset({{'text'}}).")
    if getattr(part, "requires", None):
        raise ValueError(f"{name}.requires: it is called metadata_keys now, so nothing would look at it. Rename it.")


def check_metadata(task: Task, *parts: Reward | Sampler) -> None:
    """Refuse rewards, and samplers that read, that would look for task data that is not there.

    Raises:
        ValueError: naming what is missing and what exists; or a part whose `metadata_keys` are no set of names.
    """
    for part in parts:
        _check_keys(part)
        missing = sorted(part.metadata_keys - task.provides) if part.metadata_keys else []
        if missing:
            raise ValueError(
                f"{type(part).__name__} needs the metadata {missing}, but the prompts of {type(task).__name__} carry "
                f"{sorted(task.provides) or 'none'}. Use the {'reward' if isinstance(part, Reward) else 'sampler'} "
                "with its own task, or add the keys to your prompt file."
            )
