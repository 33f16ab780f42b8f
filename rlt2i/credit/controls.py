"""Controls: without them, a gain from a map says nothing about the map.

`uniform` is no allocation at all. The placebos take one thing away from a map each: `Shuffled` both its places and its
smoothness, `TorusShift` its places alone, `OtherRollout` what it says of this rollout and not of its prompt. An
inverted map points away from it; the oracle knows where the judged objects ended up.
"""

from __future__ import annotations

import attrs
import torch
from attrs import validators
from torch import Tensor
from torch.nn.functional import interpolate

from rlt2i.credit.algebra import Allocation
from rlt2i.functional.allocation import inverted_map, mean_one
from rlt2i.interfaces import CreditContext, Needs
from rlt2i.seeds import generator
from rlt2i.types import Causality


@attrs.frozen(kw_only=True)
class Control(Allocation):
    """Another allocation with something changed about its maps.

    Attributes:
        allocation: the other one.
    """

    allocation: Allocation

    @property
    def causality(self) -> Causality:
        return self.allocation.causality

    @property
    def needs(self) -> Needs:
        return self.allocation.needs


@attrs.frozen(kw_only=True)
class Shuffled(Control):
    """Another allocation's maps, with its locations permuted, one permutation per rollout.

    The multiset of weights, and with it entropy, maximum and effective support, stays exactly the same at every step.
    Neighbours are torn apart, so a shuffled map also differs in smoothness: see `TorusShift`. The permutation is a
    function of the rollout's identity, so the number of processes does not matter.
    """

    def weight(self, context: CreditContext) -> Tensor:
        weight = _of_every_rollout(_resolving_places(self, self.allocation.weight(context)), context)
        _, steps, height, width = weight.shape
        draws = [generator("shuffled", key) for key in context.keys.tolist()]
        order = torch.stack([torch.randperm(height * width, generator=draw) for draw in draws])
        flat = weight.flatten(2)
        return flat.gather(2, order[:, None].to(flat.device).expand(-1, steps, -1)).view_as(weight)


@attrs.frozen(kw_only=True)
class TorusShift(Control):
    """Another allocation's maps, moved as a whole: what leaves at one edge comes back at the opposite one.

    Weights and their smoothness stay as they are (but for the seam), and only the place is wrong: the placebo for a
    gain that a `Shuffled` map loses because it is rugged. Each rollout is moved by its own distance, the same at every
    step and a function of its identity: by a quarter to three quarters of every side that has at least two cells.
    """

    def weight(self, context: CreditContext) -> Tensor:
        weight = _of_every_rollout(_resolving_places(self, self.allocation.weight(context)), context)
        moved = []
        for rows, key in zip(weight, context.keys.tolist(), strict=True):
            draw = generator("torus-shift", key)
            moved.append(rows.roll([_distance(side, draw) for side in weight.shape[2:]], dims=(1, 2)))
        return torch.stack(moved)


@attrs.frozen(kw_only=True)
class OtherRollout(Control):
    """The map of another rollout of the same prompt, of the same step: the next one in the order of their identities.

    Statistics, smoothness and what the prompt says about places stay; what the map knows of this very rollout goes.
    With a shared initial noise the images of a prompt resemble each other, and so do their maps: then a small
    difference is what can be expected.
    """

    @property
    def needs(self) -> Needs:
        return Needs.of_all((self.allocation.needs, Needs(groups=True)))

    def weight(self, context: CreditContext) -> Tensor:
        weight = _resolving_places(self, self.allocation.weight(context))
        if len(weight) == 1:
            raise ValueError(
                f"OtherRollout(allocation={type(self.allocation).__name__}): all rollouts have one and the same map, "
                "so that of another is their own. Use TorusShift or Shuffled."
            )
        order = context.keys.view(-1, context.group_size).argsort(dim=1)
        following = torch.empty_like(order).scatter_(1, order, order.roll(-1, dims=1))
        first = torch.arange(0, len(weight), context.group_size, device=order.device)[:, None]
        return weight[(first + following).flatten().to(weight.device)]


@attrs.frozen(kw_only=True)
class Inverted(Control):
    """Another allocation turned around: much where it gives little, and the reverse."""

    def weight(self, context: CreditContext) -> Tensor:
        return inverted_map(_resolving_places(self, self.allocation.weight(context)))


@attrs.frozen(kw_only=True)
class Oracle(Allocation):
    """The regions that the reward judged, from ground truth. Only tasks with known regions offer it.

    It looks at the finished image, so it depends on the outcome: an upper bound for localisation, not an unbiased one.

    Attributes:
        mix: share of the region map against the uniform map.
        floor: weight of places outside every region, relative to inside.
    """

    causality: Causality = attrs.field(default="outcome", init=False)

    mix: float = attrs.field(default=0.5, validator=[validators.ge(0.0), validators.le(1.0)])
    floor: float = attrs.field(default=0.02, validator=[validators.gt(0.0), validators.le(1.0)])

    @property
    def needs(self) -> Needs:
        return Needs(reward={"maps"})

    def weight(self, context: CreditContext) -> Tensor:
        maps = context.rewards.maps
        assert maps is not None, "Algorithm checks that the reward offers maps"
        region = interpolate(maps[:, None].float(), size=context.token_grid, mode="area")
        # An image without any judged object has no region: its weight is uniform, not zero.
        region = torch.where(region.amax(dim=(2, 3), keepdim=True) > 0, region, torch.ones_like(region))
        return (1 - self.mix) + self.mix * mean_one(region + self.floor, dims=(2, 3))


def _of_every_rollout(weight: Tensor, context: CreditContext) -> Tensor:
    """[B, ...]: a map that all rollouts share is moved for each of them."""
    return weight.expand(len(context.keys), -1, -1, -1)


def _distance(side: int, draw: torch.Generator) -> int:
    """Between a quarter and three quarters of a side, and never 0 where there are two cells."""
    if side < 2:
        return 0
    nearest, farthest = max(1, side // 4), max(1, side - max(1, side // 4))
    return int(torch.randint(nearest, farthest + 1, (1,), generator=draw))


def _resolving_places(control: Control, weight: Tensor) -> Tensor:
    """The weight itself.

    Raises:
        ValueError: where it is the same at every place, so that the control would compare it with itself.
    """
    if weight.shape[2:] == (1, 1):
        kind, of = type(control).__name__, type(control.allocation).__name__
        raise ValueError(
            f"{kind}(allocation={of}): {of} weighs steps and not places, so there is no map to turn around or to "
            f"permute. Use {kind} on an allocation over space such as TextAttention, or leave {of} out for the control."
        )
    return weight
