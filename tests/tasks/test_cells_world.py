"""The cells world: prompts and their split, scenes, the verifier, the task and its rewards."""

from __future__ import annotations

import json

import pytest
import torch

from rlt2i.interfaces import RewardBatch
from rlt2i.tasks.cells.prompts import CellsPrompt, Content, all_prompts, near_misses, split_prompts
from rlt2i.tasks.cells.render import render, sample_scenes
from rlt2i.tasks.cells.reward import CellsReward, CornerReward
from rlt2i.tasks.cells.task import CellsTask
from rlt2i.tasks.cells.verifier import verify
from rlt2i.tasks.cells.vocabulary import WORDS, side

KINDS = [(2, 1), (2, 2), (3, 1), (3, 2)]
kinds = pytest.mark.parametrize(("grid", "named"), KINDS)


def prompt(grid: int, *contents: tuple[int, str, str]) -> CellsPrompt:
    return CellsPrompt(grid=grid, named=tuple(Content(cell=c, shape=s, colour=k) for c, s, k in contents))


def drawn(prompts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return render(sample_scenes(prompts, generator), generator)


def some(grid: int, named: int, count: int) -> list[CellsPrompt]:
    prompts = all_prompts(grid, named)
    return [prompts[i * len(prompts) // count] for i in range(count)]


def batch_of(prompts, images) -> RewardBatch:
    return RewardBatch(
        images=(images * 255).round().to(torch.uint8),
        prompts=[p.text for p in prompts],
        metadata=[json.loads(json.dumps(p.metadata())) for p in prompts],
    )


# Prompts


def test_captions_by_hand():
    one, two = prompt(2, (0, "circle", "red")), prompt(3, (1, "square", "blue"), (8, "triangle", "yellow"))
    assert one.text == "a red circle above left"
    assert two.text == "a blue square top centre and a yellow triangle bottom right"
    assert two.core == ("blue square top centre", "yellow triangle bottom right")
    assert (one.category, two.category) == ("above left", "top centre + bottom right")


@kinds
def test_captions_are_unambiguous_and_made_of_known_words(grid: int, named: int):
    prompts = all_prompts(grid, named)
    cells, objects = grid**2, 12
    assert len(prompts) == (cells if named == 1 else cells * (cells - 1) // 2) * objects**named
    assert len({p.text for p in prompts}) == len(prompts)
    assert {word for p in prompts for word in p.text.split()} <= set(WORDS)


def test_grids_are_told_apart_by_their_words():
    small, large = ({p.text for named in (1, 2) for p in all_prompts(grid, named)} for grid in (2, 3))
    assert not small & large


@kinds
def test_split_is_disjoint_complete_and_covers_every_cell(grid: int, named: int):
    train, held_out = split_prompts(grid, named)
    assert train.keys() == held_out.keys() == {p.category for p in all_prompts(grid, named)}
    trained, kept = ({p.text for pool in half.values() for p in pool} for half in (train, held_out))
    assert not trained & kept
    assert len(trained) + len(kept) == len(all_prompts(grid, named))
    assert len(kept) * 4 == len(all_prompts(grid, named))
    # The task draws from the halves and nowhere else.
    task = CellsTask(grid=grid, named=named)
    assert {p.text for p in task.train_prompts(seed=5, start=0, count=200)} <= trained
    assert {p.text for p in task.eval_prompts(200)} <= kept


def test_held_out_by_hand():
    # Above left is cell 0: circle (0) in red (0), square (1) in yellow (3), triangle (2) in blue (2) are kept back.
    assert [p.text.split()[1:3] for p in split_prompts(2, 1)[1]["above left"]] == [
        ["red", "circle"],
        ["yellow", "square"],
        ["blue", "triangle"],
    ]


def test_prompts_are_deterministic_and_take_turns():
    task = CellsTask()
    whole = task.train_prompts(seed=3, start=0, count=12)
    assert whole[5:9] == task.train_prompts(seed=3, start=5, count=4)
    assert whole != task.train_prompts(seed=4, start=0, count=12)
    assert [p.category for p in whole[:4]] == ["above left", "above right", "below left", "below right"]
    assert task.eval_prompts(24)[:12] == task.eval_prompts(12) == task.eval_prompts(24)[12:]
    with pytest.raises(ValueError, match="at least 1"):
        task.eval_prompts(0)


def test_each_grid_has_its_own_canvas():
    CellsTask(grid=2).check_image_size(32)
    CellsTask(grid=3).check_image_size(36)
    with pytest.raises(ValueError, match=r"Set train.image_size=36"):
        CellsTask(grid=3).check_image_size(32)


@pytest.mark.parametrize("cells", [(), (1, 0), (2, 2), (0, 4), (0, 1, 2)])
def test_cells_that_the_grid_lacks_are_refused(cells: tuple[int, ...]):
    with pytest.raises(
        ValueError, match=r"Name one or two different ones, in reading order, from 0 to 3|names the cells"
    ):
        prompt(2, *((c, "circle", "red") for c in cells))


def test_metadata_survives_json_and_says_what_it_lacks():
    two = prompt(3, (1, "square", "blue"), (8, "triangle", "yellow"))
    assert CellsPrompt.from_metadata(json.loads(json.dumps(two.metadata()))) == two
    with pytest.raises(ValueError, match="lacks cells"):
        CellsPrompt.from_metadata({"grid": 2})


# Verifier


@kinds
def test_verifier_is_right_about_what_is_drawn(grid: int, named: int):
    prompts = some(grid, named, 60)
    images = drawn(prompts)
    assert images.shape == (60, 3, side(grid), side(grid))
    verdict = verify(images, prompts)
    assert verdict.strict.eq(1).all()
    assert verdict.partial.eq(1).all()
    misses = [near_misses(p)[i % 5] for i, p in enumerate(prompts)]  # two wrong shapes, then three wrong colours
    wrong = verify(images, misses)
    assert wrong.strict.eq(0).all()
    of_cell = torch.tensor([0.0 if i % 5 < 2 else 0.5 for i in range(60)])
    torch.testing.assert_close(wrong.partial, (of_cell + (named - 1)) / named)


@kinds
def test_only_the_named_cells_are_judged_and_their_area_is_known(grid: int, named: int):
    prompts = some(grid, named, 12)
    images = drawn(prompts)
    verdict = verify(images, prompts)
    assert verdict.region.float().mean(dim=(1, 2)).tolist() == pytest.approx([named / grid**2] * 12)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1)).round()
    elsewhere = verify(torch.where(verdict.region[:, None], images, noise), prompts)
    assert torch.equal(elsewhere.partial, verdict.partial)
    within = verify(torch.where(verdict.region[:, None], noise, images), prompts)
    assert within.strict.eq(0).all()


def test_the_region_is_a_function_of_the_prompt_alone():
    prompts = some(3, 2, 8)
    assert torch.equal(verify(drawn(prompts, 0), prompts).region, verify(torch.zeros(8, 3, 36, 36), prompts).region)


def test_verifier_refuses_another_canvas_and_unequal_numbers():
    with pytest.raises(ValueError, match=r"Set train.image_size to 36"):
        verify(torch.zeros(1, 3, 32, 32), some(3, 1, 1))
    with pytest.raises(ValueError, match="one prompt per image"):
        verify(torch.zeros(2, 3, 32, 32), some(2, 1, 1))


def test_scenes_of_two_grids_are_not_mixed():
    with pytest.raises(ValueError, match="Draw the scenes of each grid apart"):
        sample_scenes([*some(2, 1, 1), *some(3, 1, 1)], torch.Generator())


# Rewards


def test_reward_by_hand():
    right = prompt(2, (0, "circle", "red"), (3, "square", "blue"))
    # What is asked for, one cell in the wrong colour, one in the wrong shape.
    asked = [
        right,
        prompt(2, (0, "circle", "green"), (3, "square", "blue")),
        prompt(2, (0, "circle", "red"), (3, "circle", "blue")),
    ]
    images = drawn([right]).expand(3, -1, -1, -1)
    want = frozenset({"maps", "regions"})
    plain = CellsReward().score(batch_of(asked, images), want)
    assert plain.scores.tolist() == [1.0, 0.75, 0.5]
    assert plain.components["strict"].tolist() == [1.0, 0.0, 0.0]
    assert plain.info == [{"wrong": []}, {"wrong": ["above left"]}, {"wrong": ["below right"]}]
    assert CellsReward(strict_weight=0.5).score(batch_of(asked, images)).scores.tolist() == [1.0, 0.375, 0.25]
    assert plain.regions is not None
    assert [[r.credit for r in of_image] for of_image in plain.regions] == [[1.0, 1.0], [0.0, 1.0], [1.0, -1.0]]
    first, second = plain.regions[0]
    assert (first.label, first.box, second.box) == ("above left", (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0))
    assert plain.maps is not None
    assert torch.equal(plain.maps[0].bool(), first.mask | second.mask)


def test_maps_fall_on_whole_image_tokens():
    # A token has 4 x 4 pixels: averaged over tokens, the map of a cell is still zeros and ones.
    for grid in (2, 3):
        prompts = some(grid, 1, grid**2)
        maps = CellsReward().score(batch_of(prompts, drawn(prompts)), frozenset({"maps"})).maps
        tokens = torch.nn.functional.avg_pool2d(maps[:, None], 4)
        assert set(tokens.unique().tolist()) == {0.0, 1.0}


def test_corner_reads_its_own_part_and_nothing_else():
    images = torch.zeros(2, 3, 32, 32)
    images[0, 1, :16, :16] = 1.0  # green above left
    images[1, 1, 16:, :] = 1.0  # green, but below
    batch = batch_of(some(2, 1, 2), images)
    reward = CornerReward()
    output = reward.score(batch, frozenset({"maps"}))
    assert output.scores.tolist() == [1.0, 0.0]
    assert output.maps.mean(dim=(1, 2)).tolist() == [0.25, 0.25]
    pixels = images.clone().requires_grad_()
    reward.score_tensor(pixels, batch.prompts, batch.metadata).sum().backward()
    assert pixels.grad[:, :, 16:].eq(0).all()
    assert pixels.grad[0, :, 3, 3].tolist() == pytest.approx([-0.5 / 256, 1 / 256, -0.5 / 256])
    assert CornerReward(share=0.25).score(batch, frozenset({"maps"})).maps.mean().item() == 1 / 16
