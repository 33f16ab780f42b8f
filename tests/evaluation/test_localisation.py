"""Which map finds the objects: the measure by hand, and the choice that `auto` makes."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.algorithm import Algorithm
from rlt2i.credit.algebra import Product
from rlt2i.credit.controls import Shuffled
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.text_attention import TextAttention
from rlt2i.evaluation.auto import asks_for_auto, resolve_auto
from rlt2i.evaluation.localisation import Localisation, area_under_roc
from rlt2i.interfaces import Reward, RewardBatch, RewardOutput
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.samplers.sde import SDE
from tests.helpers.toy import ToySpec
from tests.helpers.toy_recipe import clipped


def test_area_under_roc_by_hand():
    # Inside scores 3 and 1, outside 2 and 0: of the four pairs, 3>2, 3>0, 1>0 are right and 1<2 is wrong: 3/4.
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    inside = torch.tensor([[True, True, False, False], [True, False, False, False], [False, False, False, False]])
    auc = area_under_roc(scores, inside)
    torch.testing.assert_close(auc[:2], torch.tensor([0.75, 0.5]))
    assert torch.isnan(auc[2])  # nothing inside: no answer, not a half


def test_area_under_roc_is_what_comparing_all_pairs_gives():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (5, 60), generator=generator).float()  # many ties
    inside = torch.rand(5, 60, generator=generator) < 0.3
    for row in range(5):
        one, other = scores[row, inside[row]][:, None], scores[row, ~inside[row]][None]
        expected = ((one > other).float() + 0.5 * (one == other).float()).mean()
        torch.testing.assert_close(area_under_roc(scores, inside)[row], expected)


def test_area_under_roc_takes_a_large_grid():
    # 512 x 512 cells: comparing all pairs would need 275 GB. The upper half is inside, and scores rise downwards.
    scores = torch.arange(512 * 512.0)[None]
    inside = (torch.arange(512 * 512) < 512 * 256)[None]
    assert area_under_roc(scores, inside).tolist() == [0.0]
    assert area_under_roc(-scores, inside).tolist() == [1.0]


def test_best_map_is_the_one_with_the_highest_mean_over_steps():
    measured = Localisation(
        auc={("image_to_text", 0): torch.tensor([0.9, 0.5]), ("text_to_image", 1): torch.tensor([0.7, 0.8])}, images=3
    )
    assert measured.best() == ("text_to_image", 1)
    assert "text_to_image" in measured.table()


def auto_recipe(allocation: object):
    recipe = clipped(eval_prompts=0)
    return attrs.evolve(recipe, credit=Product(advantage=GroupRelative(), allocations=(allocation,)))


@pytest.mark.parametrize(
    "allocation",
    [TextAttention(direction="auto", blocks="auto"), Shuffled(allocation=TextAttention(blocks="auto"))],
    ids=["plain", "inside a control"],
)
def test_auto_is_replaced_by_what_was_measured(allocation):
    recipe = auto_recipe(allocation)
    assert asks_for_auto(recipe)
    resolved, measured = resolve_auto(recipe)
    assert measured is not None
    # The toy offers one block in one direction, so that is what must have been chosen.
    assert set(measured.auc) == {("image_to_text", 0)}
    assert not asks_for_auto(resolved)
    assert resolved.algorithm().captures == {"attention/image_to_text/0"}
    assert resolve_auto(resolved) == (resolved, None)


@attrs.frozen(kw_only=True)
class Blind(Reward):
    """Scores, but knows no regions."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        n = len(batch.prompts)
        return RewardOutput(scores=torch.zeros(n), valid=torch.ones(n, dtype=torch.bool))


def test_auto_needs_a_reward_that_knows_regions():
    with pytest.raises(ValueError, match="compares attention with the regions"):
        Algorithm(
            policy=ToySpec(),
            sampler=SDE(),
            reward=Blind(),
            credit=Product(advantage=GroupRelative(), allocations=(TextAttention(blocks="auto"),)),
            objective=ClippedSurrogate(),
        )


def test_a_direction_cannot_be_chosen_without_its_block():
    with pytest.raises(ValueError, match="chosen together"):
        TextAttention(direction="auto", blocks="2")
    undecided = TextAttention(direction="auto", blocks="auto")
    assert undecided.needs.reward == {"maps"}
    with pytest.raises(ValueError, match="has not been chosen yet"):
        _ = undecided.capture
