"""STAR's allocation: the generator's own attention between the image and the words the user cares about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs
from attrs import validators
from torch import Tensor

from rlt2i.captures import AUTO, attention_name
from rlt2i.credit.algebra import Allocation
from rlt2i.functional.allocation import attention_allocation
from rlt2i.interfaces import CreditContext, Needs
from rlt2i.types import Causality

_unit = [validators.ge(0.0), validators.le(1.0)]


@attrs.frozen(kw_only=True)
class TextAttention(Allocation):
    """Maps that vary by rollout and by denoising step, from attention at the state x_t (STAR, arXiv 2606.17979).

    The paper's equations are not public in what we could read: this is a reconstruction and every unknown is a field.
    The map is a function of the state before the step's noise is drawn, so it preconditions the policy gradient without
    biasing its stationary points. A prompt without any core word gets the uniform map.

    Attributes:
        direction: "image_to_text" reads how much each image token looks at the core words, "text_to_image" the reverse.
        blocks: "middle" (third), "all", one index, or a range "8-15"; several blocks are averaged. "auto" measures
            which block (and direction, if that is "auto" too) finds the objects, on tasks whose regions are known,
            before training starts; the choice is written into the run's recipe.
        mix: share of the attention map against the uniform map; 0 is Flow-GRPO.
        sharpness: exponent of the map.
        blur: standard deviation of a Gaussian blur, in image tokens; 0 switches it off.
        floor, ceiling: bounds of the weight, before it is normalised again.
        doubt: how soon a flat, unsure map falls back to uniform: mix is multiplied by the share of places that the map
            does not use (1 - effective support) to this power. 0 switches it off.
        aggregate: how the maps of several core phrases combine.
        normalise: "mean_one" keeps the step size comparable; the others are ablations.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"entropy_power": "doubt"}

    causality: Causality = attrs.field(default="state", init=False)

    direction: Literal["image_to_text", "text_to_image", "auto"] = "image_to_text"
    blocks: str = attrs.field(default="middle", converter=str)
    mix: float = attrs.field(default=0.5, validator=_unit)
    sharpness: float = attrs.field(default=1.0, validator=validators.gt(0))
    blur: float = attrs.field(default=1.0, validator=validators.ge(0))
    floor: float = attrs.field(default=0.25, validator=_unit)
    ceiling: float = attrs.field(default=4.0, validator=validators.ge(1))
    doubt: float = attrs.field(default=0.5, validator=validators.ge(0))
    aggregate: Literal["mean", "max", "softmax"] = "mean"
    normalise: Literal["mean_one", "minmax", "sum_one", "rank"] = "mean_one"

    def __attrs_post_init__(self) -> None:
        if self.direction == AUTO and self.blocks != AUTO:
            raise ValueError(
                f"TextAttention(direction='auto', blocks={self.blocks!r}): the direction is chosen together with the "
                "block. Use blocks='auto' as well, or name the direction."
            )
        if self.blocks != AUTO:
            attention_name(self.direction, self.blocks)  # type: ignore[arg-type]

    @property
    def capture(self) -> str:
        """Name of the recorded map.

        Raises:
            ValueError: while the block is still to be chosen.
        """
        if self.blocks == AUTO:
            raise ValueError(
                "TextAttention(blocks='auto'): the block has not been chosen yet. Resolve the recipe first, as `rlt2i "
                "train` does, or name the blocks."
            )
        return attention_name(self.direction, self.blocks)  # type: ignore[arg-type]

    @property
    def needs(self) -> Needs:
        if self.blocks == AUTO:
            remedy = (
                "blocks='auto' compares attention with the regions that the reward judged. Name the blocks ('middle' "
                "is the choice for large models)."
            )
            return Needs(reward={"maps"}, remedies={"maps": remedy})
        remedy = "Change the credit's blocks or direction, or the policy."
        return Needs(captures={self.capture}, remedies={self.capture: remedy})

    def weight(self, context: CreditContext) -> Tensor:
        return attention_allocation(
            context.trajectory.captures[self.capture],
            mix=self.mix,
            sharpness=self.sharpness,
            blur=self.blur,
            floor=self.floor,
            ceiling=self.ceiling,
            doubt=self.doubt,
            aggregate=self.aggregate,
            normalise=self.normalise,
        )
