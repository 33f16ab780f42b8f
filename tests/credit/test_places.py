"""Advantages that resolve places: by hand, and under objectives with a ratio per place."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.credit.algebra import Product
from rlt2i.credit.box_flow import BoxFlow
from rlt2i.credit.dense_flow import DenseFlow
from rlt2i.credit.places import judged_map
from rlt2i.functional.place_rewards import box_flow_rewards, dense_flow_rewards, place_relative_advantage
from rlt2i.types import Region
from tests.helpers.credit_contexts import make_context

LEFT, TOP = (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 0.5)


def close(found: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), atol=1e-6, rtol=0)


def test_box_flow_rewards_by_hand():
    # R = 1 and 3: sigma = 1. c = .5 takes .5 off where the second image was hurt; c sigma = 0 in the tied group.
    judged = torch.zeros(4, 1, 2)
    judged[1, 0, 0], judged[3, 0, 1] = -1.0, -1.0
    places = box_flow_rewards(torch.tensor([1.0, 3.0, 2.0, 2.0]), judged, 2, strength=0.5)
    close(places, [[[1.0, 1.0]], [[2.5, 3.0]], [[2.0, 2.0]], [[2.0, 2.0]]])


def test_dense_flow_rewards_by_hand():
    # Half damaged: half the reward; and damage lowers a negative reward too.
    damage = torch.tensor([[[0.0, 0.5, 1.0]], [[0.0, 0.5, 1.0]]])
    close(dense_flow_rewards(torch.tensor([0.8, -0.8]), damage), [[[0.8, 0.4, 0.0]], [[-0.8, -1.2, -1.6]]])


def test_every_place_is_compared_with_itself_by_hand():
    # Left: 1 and 2.5, std .75. Right: 1 and 1.1, std .05, below the floor of .1. The third image failed.
    rewards = torch.tensor([[[1.0, 1.0]], [[2.5, 1.1]], [[9.0, 9.0]]])
    valid = torch.tensor([True, True, False])
    found = place_relative_advantage(rewards, 3, size=rewards.amax(dim=(1, 2)), min_std=0.1, valid=valid)
    close(found, [[[-1.0, -0.5]], [[1.0, 0.5]], [[0.0, 0.0]]])


def test_a_place_whose_rewards_differ_by_rounding_gets_nothing():
    # 20.1 x (1 - .3) computed on two ways differs in the last digits of numbers near 20.
    first, second = torch.tensor(20.1) * (1 - 0.3), torch.tensor(20.1) - torch.tensor(20.1) * 0.3
    rewards = torch.stack([first, second + 2e-6]).view(2, 1, 1)
    assert rewards[0] != rewards[1]
    found = place_relative_advantage(rewards, 2, size=torch.tensor([20.1, 20.1]), min_std=1e-9)
    assert found.eq(0).all()


def test_regions_become_a_signed_map_by_hand():
    # Left helped by .5, all of the top hurt twice by .75: at most 1.
    regions = [Region(box=LEFT, credit=0.5), *(Region(box=TOP, credit=-0.75),) * 2]
    context = make_context([0.0, 1.0], group_size=2, regions=[regions, []])
    close(judged_map(context, who="X"), [[[-0.5, -1.0], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    with pytest.raises(ValueError, match="BoxFlow: the reward says that it offers regions but returned none"):
        BoxFlow().advantage(make_context([0.0, 1.0], group_size=2))


def test_box_flow_blames_the_place_of_a_good_image_that_hurt():
    # R = 0, 1: sigma = .5, c = 3 takes 1.5 off the left of the better image: 0 against -.5 there, against 1 elsewhere.
    regions = [[], [Region(box=LEFT, credit=-1.0)]]
    context = make_context([0.0, 1.0], group_size=2, regions=regions)
    found = BoxFlow(strength=3.0).advantage(context)
    close(found, [[[[1.0, -1.0]] * 2], [[[-1.0, 1.0]] * 2]])
    # Where it helped, "all" adds: 0 against 2.5, still one standard deviation to either side.
    helped = make_context([0.0, 1.0], group_size=2, regions=[[], [Region(box=LEFT, credit=1.0)]])
    close(BoxFlow(strength=3.0, signs="all", min_std=2.5).advantage(helped)[1, 0], [[0.5, 0.2]] * 2)
    close(BoxFlow(strength=3.0, min_std=2.5).advantage(helped)[1, 0], [[0.2, 0.2]] * 2)


def test_dense_flow_praises_what_is_whole():
    # Both images have R = 1; the second lost its left. 1 against 0 there, a tie elsewhere.
    context = make_context([1.0, 1.0], group_size=2, regions=[[], [Region(box=LEFT, credit=-1.0)]])
    close(DenseFlow().advantage(context), [[[[1.0, 0.0]] * 2], [[[-1.0, 0.0]] * 2]])


@pytest.mark.parametrize("part", [BoxFlow(), DenseFlow()])
def test_without_anything_wrong_every_place_has_the_advantage_of_the_image(part):
    context = make_context([0.0, 1.0, 4.0, 4.0], group_size=2, regions=[[]] * 4)
    credit = Product(advantage=part).assign(context)
    assert credit.grid == context.token_grid
    close(credit.advantage.mean(dim=(1, 2, 3)), [-1.0, 1.0, 0.0, 0.0])
    assert (credit.advantage.amax(dim=(2, 3)) == credit.advantage.amin(dim=(2, 3))).all()


def test_invalid_rollouts_get_nothing_and_count_for_nothing():
    regions = [[Region(box=LEFT, credit=-1.0)]] * 3
    context = make_context([0.0, 1.0, 1e6], group_size=3, regions=regions, valid=[True, True, False])
    alone = make_context([0.0, 1.0], group_size=2, regions=regions[:2])
    for part in (BoxFlow(), DenseFlow()):
        found = part.advantage(context)
        assert found[2].eq(0).all()
        torch.testing.assert_close(found[:2], part.advantage(alone))
    nan = attrs.evolve(context, rewards=attrs.evolve(context.rewards, values=torch.tensor([[0.0], [1.0], [torch.nan]])))
    torch.testing.assert_close(BoxFlow().advantage(nan)[:2], BoxFlow().advantage(alone))
