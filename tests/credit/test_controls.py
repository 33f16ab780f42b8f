"""Placebos: what each of them takes from a map, and what it leaves."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from rlt2i.credit.algebra import Allocation
from rlt2i.credit.controls import OtherRollout, Shuffled, TorusShift
from rlt2i.interfaces import CreditContext
from tests.helpers.credit_contexts import make_context


@attrs.frozen(kw_only=True)
class Given(Allocation):
    """Maps from the outside, one for each identity."""

    maps: Tensor

    def weight(self, context: CreditContext) -> Tensor:
        return self.maps[context.keys]


def smooth_maps(count: int, steps: int = 2, side: int = 8) -> Tensor:
    """[count, steps, side, side] periodic bumps at places that differ by rollout and step."""
    place = torch.arange(side) * 2 * torch.pi / side
    phase = torch.arange(count * steps).view(count, steps, 1, 1).float()
    return 1 + 0.5 * torch.cos(place[:, None] + phase) * torch.cos(place + 2 * phase)


def roughness(weight: Tensor) -> Tensor:
    """[B, T] mean squared difference of neighbours on the torus."""
    return sum((weight - weight.roll(1, dims=axis)).square().mean(dim=(2, 3)) for axis in (2, 3))


MAPS = smooth_maps(8)
CONTEXT = make_context([0.0] * 8, group_size=4)
ORIGINAL = Given(maps=MAPS).weight(CONTEXT)


@pytest.mark.parametrize("control", [Shuffled, TorusShift])
def test_the_multiset_of_weights_stays_and_the_places_go(control):
    weight = control(allocation=Given(maps=MAPS)).weight(CONTEXT)
    torch.testing.assert_close(weight.flatten(2).sort().values, ORIGINAL.flatten(2).sort().values)
    assert all(not torch.equal(ours, theirs) for ours, theirs in zip(weight, ORIGINAL, strict=True))


def test_a_shift_keeps_smoothness_and_a_shuffle_does_not():
    moved = TorusShift(allocation=Given(maps=MAPS)).weight(CONTEXT)
    torn = Shuffled(allocation=Given(maps=MAPS)).weight(CONTEXT)
    torch.testing.assert_close(roughness(moved), roughness(ORIGINAL))
    assert (roughness(torn) > 2 * roughness(ORIGINAL)).all()


def test_a_shift_is_the_same_at_every_step_and_at_least_a_quarter_of_a_side():
    marks = torch.zeros(8, 2, 8, 8)
    marks[:, :, 0, 0] = 64.0
    moved = TorusShift(allocation=Given(maps=marks)).weight(CONTEXT)
    places = moved.flatten(2).argmax(dim=2)
    assert torch.equal(places[:, 0], places[:, 1])
    rows, columns = places[:, 0] // 8, places[:, 0] % 8
    assert ((rows >= 2) & (rows <= 6) & (columns >= 2) & (columns <= 6)).all()
    assert len(places[:, 0].unique()) > 3


def test_another_rollout_of_the_prompt_lends_its_map_of_the_same_step():
    weight = OtherRollout(allocation=Given(maps=MAPS)).weight(CONTEXT)
    assert torch.equal(weight, ORIGINAL[[1, 2, 3, 0, 5, 6, 7, 4]])


def test_all_rollouts_sharing_a_map_leave_no_other():
    shared = attrs.make_class("Shared", [], bases=(Allocation,), frozen=True)
    shared.weight = lambda self, context: MAPS[:1]
    shared.__abstractmethods__ = frozenset()
    with pytest.raises(ValueError, match="all rollouts have one and the same map"):
        OtherRollout(allocation=shared()).weight(CONTEXT)


@pytest.mark.parametrize("control", [Shuffled, TorusShift, OtherRollout])
def test_a_placebo_is_a_function_of_the_rollout_and_not_of_who_shares_its_process(control):
    whole = control(allocation=Given(maps=MAPS)).weight(CONTEXT)
    trajectory = CONTEXT.trajectory
    second = attrs.evolve(
        make_context([0.0] * 4, group_size=4),
        trajectory=attrs.evolve(trajectory.take(torch.arange(4, 8)), group_size=4),
        keys=CONTEXT.keys[4:],
        rank=1,
    )
    assert torch.equal(control(allocation=Given(maps=MAPS)).weight(second), whole[4:])
