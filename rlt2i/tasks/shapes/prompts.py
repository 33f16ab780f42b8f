"""Prompts of the shapes world: a miniature GenEval with six categories and 123 prompts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import attrs

from rlt2i.tasks.shapes.vocabulary import CATEGORIES, COLOURS, NUMBERS, PLURALS, RELATIONS, SHAPES

HELD_OUT = {"two_object": 2, "colors": 3, "position": 8, "color_attr": 24}
"""How many combinations of each category RL never trains on."""

_SPLIT_SEED = 809
"""Chosen before any training, among 3,000, for spreading the held-out shapes, colours and relations evenly."""


@attrs.frozen(kw_only=True)
class ShapesPrompt:
    """One sentence and what it asks for, exactly.

    Attributes:
        text: The sentence a model is conditioned on.
        category: One of GenEval's six categories (`CATEGORIES`).
        objects: (shape, colour) pairs that must be visible; a colour of None means any colour.
            A counting prompt names its one shape once and says how many in `count`.
        count: How many objects the image should contain in total.
        relation: Where the first object is, seen from the second; None unless category is position.
    """

    text: str
    category: str = attrs.field()
    objects: tuple[tuple[str, str | None], ...] = attrs.field()
    count: int = attrs.field()
    relation: str | None = attrs.field(default=None)

    @category.validator
    def _check_category(self, _: Any, value: str) -> None:
        if value not in CATEGORIES:
            raise ValueError(f"ShapesPrompt(category={value!r}): unknown. Use one of {', '.join(CATEGORIES)}.")

    @objects.validator
    def _check_objects(self, _: Any, value: tuple[tuple[str, str | None], ...]) -> None:
        if not value:
            raise ValueError("ShapesPrompt(objects=()): a prompt must name an object. Give at least one pair.")
        for shape, colour in value:
            if shape not in SHAPES or not (colour is None or colour in COLOURS):
                raise ValueError(
                    f"ShapesPrompt(objects={value!r}): ({shape!r}, {colour!r}) is not in this world. "
                    f"Shapes are {', '.join(SHAPES)}; colours are {', '.join(COLOURS)} or None."
                )

    @count.validator
    def _check_count(self, _: Any, value: int) -> None:
        wanted = NUMBERS if self.category == "counting" else {len(self.objects)}
        if value not in wanted:
            raise ValueError(
                f"ShapesPrompt(count={value}): {self.category} with {len(self.objects)} named object(s) "
                f"needs a count in {sorted(wanted)}."
            )

    @relation.validator
    def _check_relation(self, _: Any, value: str | None) -> None:
        if (self.category == "position") != (value in RELATIONS):
            raise ValueError(
                f"ShapesPrompt(category={self.category!r}, relation={value!r}): position prompts need one of "
                f"{', '.join(RELATIONS)}; other prompts need None."
            )

    @property
    def core(self) -> tuple[str, ...]:
        """The phrases that carry content - objects, colours, numbers, relations - in order of appearance."""
        if self.category == "counting":
            shape, _ = self.objects[0]
            return (NUMBERS[self.count], PLURALS[shape])
        phrases = [" ".join(filter(None, (colour, shape))) for shape, colour in self.objects]
        if self.relation is not None:
            phrases.insert(1, self.relation)
        return tuple(phrases)

    def metadata(self) -> dict[str, Any]:
        """A JSON-able description, from which `from_metadata` rebuilds this prompt."""
        return {
            "text": self.text,
            "category": self.category,
            "objects": [[shape, colour] for shape, colour in self.objects],
            "count": self.count,
            "relation": self.relation,
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ShapesPrompt:
        """Rebuild a prompt from its `metadata()`, also after a round trip through JSON.

        Raises:
            ValueError: A key is missing, or the values describe nothing in this world.
        """
        missing = [field.name for field in attrs.fields(cls) if field.name not in metadata]
        if missing:
            raise ValueError(
                f"ShapesPrompt.from_metadata: {dict(metadata)!r} lacks {', '.join(missing)}. "
                "Pass what ShapesPrompt.metadata() returned."
            )
        return cls(
            text=metadata["text"],
            category=metadata["category"],
            objects=tuple((shape, colour) for shape, colour in metadata["objects"]),
            count=metadata["count"],
            relation=metadata["relation"],
        )


def _named(shape: str, colour: str | None = None) -> str:
    return f"a {shape}" if colour is None else f"a {colour} {shape}"


def all_prompts() -> tuple[ShapesPrompt, ...]:
    """Every prompt of the world: 3 single_object, 6 two_object, 6 counting, 12 colors, 24 position, 72 color_attr.

    Two-object prompts name two different shapes, and color_attr prompts two different colours.
    The order is fixed, by category.
    """
    pairs = list(itertools.permutations(SHAPES, 2))
    single = [ShapesPrompt(text=_named(a), category="single_object", objects=((a, None),), count=1) for a in SHAPES]
    two = [
        ShapesPrompt(
            text=f"{_named(a)} and {_named(b)}", category="two_object", objects=((a, None), (b, None)), count=2
        )
        for a, b in pairs
    ]
    counting = [
        ShapesPrompt(text=f"{word} {PLURALS[a]}", category="counting", objects=((a, None),), count=n)
        for a in SHAPES
        for n, word in NUMBERS.items()
    ]
    colors = [
        ShapesPrompt(text=_named(a, c), category="colors", objects=((a, c),), count=1) for a in SHAPES for c in COLOURS
    ]
    position = [
        ShapesPrompt(
            text=f"{_named(a)} {relation} {_named(b)}",
            category="position",
            objects=((a, None), (b, None)),
            count=2,
            relation=relation,
        )
        for a, b in pairs
        for relation in RELATIONS
    ]
    color_attr = [
        ShapesPrompt(
            text=f"{_named(a, c)} and {_named(b, d)}", category="color_attr", objects=((a, c), (b, d)), count=2
        )
        for a, b in pairs
        for c, d in itertools.permutations(COLOURS, 2)
    ]
    return (*single, *two, *counting, *colors, *position, *color_attr)


def split_prompts() -> tuple[tuple[ShapesPrompt, ...], tuple[ShapesPrompt, ...]]:
    """The fixed (train, held-out) split of all prompts, for RL.

    Held out are 2 of 6 two_object, 3 of 12 colors, 8 of 24 position and 24 of 72 color_attr combinations:
    no reward is ever computed on them in training. `single_object` (3 prompts) and `counting` (6) are too
    small to hold anything out: all of their prompts are in both halves, and a gain there says nothing
    about generalisation. Pretraining sees every prompt: the split is about RL alone.
    """
    order = random.Random(_SPLIT_SEED)
    train: list[ShapesPrompt] = []
    held_out: list[ShapesPrompt] = []
    for category, members in itertools.groupby(all_prompts(), key=lambda prompt: prompt.category):
        shuffled = order.sample(prompts := list(members), k=HELD_OUT.get(category, 0))
        held_out += shuffled or prompts
        train += [prompt for prompt in prompts if prompt not in shuffled]
    return tuple(train), tuple(held_out)


def eval_prompts(n_per_category: int) -> tuple[ShapesPrompt, ...]:
    """A balanced evaluation list: `n_per_category` held-out prompts of each category, six categories in order.

    Prompts repeat in turn where a category holds fewer than `n_per_category` of them.

    Raises:
        ValueError: `n_per_category` is less than 1.
    """
    if n_per_category < 1:
        raise ValueError(
            f"eval_prompts({n_per_category}): an evaluation needs images. Ask for at least 1 per category."
        )
    _, held_out = split_prompts()
    return tuple(
        prompt
        for category in CATEGORIES
        for prompt in itertools.islice(itertools.cycle(p for p in held_out if p.category == category), n_per_category)
    )


def near_misses(prompt: ShapesPrompt) -> tuple[ShapesPrompt, ...]:
    """The prompts that differ from this one in exactly one shape, colour, number or relation.

    They are what a careless annotator confuses, and the hardest wrong prompts for a verifier.
    """

    def slots(p: ShapesPrompt) -> tuple[object, ...]:
        return (*itertools.chain.from_iterable(p.objects), p.count, p.relation)

    return tuple(
        other
        for other in all_prompts()
        if other.category == prompt.category
        and sum(a != b for a, b in zip(slots(prompt), slots(other), strict=True)) == 1
    )
