"""Noise levels and decays as recipes choose them: by hand."""

from __future__ import annotations

import pytest
import torch

from rlt2i.config import ConfigError
from rlt2i.interfaces import Objective
from rlt2i.objectives.awm import AWM
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.recipes.recipe import build_part, load_recipe
from tests.helpers.build import toy_algorithm, toy_learner
from tests.helpers.objective_cases import FLOW, experience_for


def drawn(draws: SigmaDraws, keys: int = 400) -> torch.Tensor:
    """[keys * count] noise levels."""
    learner = toy_learner(toy_algorithm(AWM(), sampler=FLOW))
    context = learner._context(1, 1, on_policy=True)
    sigma, step = draws.draw(experience_for(AWM()), torch.arange(keys), context=context)
    assert step.shape == sigma.shape == (keys, draws.count)
    return sigma.flatten()


def test_logit_normal_draws_lie_where_the_distribution_has_them():
    sigma = drawn(SigmaDraws(grid="logit_normal", mean=0.5, std=0.8, low=0.001, high=0.999), keys=4000)
    # z below 0 and below 1 has probability .5 and .8413; sigma is sigmoid(mean + std z).
    for z, share in ((0.0, 0.5), (1.0, 0.8413), (-1.0, 0.1587)):
        bound = torch.sigmoid(torch.tensor(0.5 + 0.8 * z))
        assert (sigma <= bound).float().mean().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("towards", "median"), [("noise", 0.75), ("image", 0.25)])  # 3 * .5 / (1 + 2 * .5) = .75
@pytest.mark.parametrize("grid", ["uniform", "logit_normal"])
def test_a_shift_moves_the_median(grid, towards, median: float):
    sigma = drawn(SigmaDraws(grid=grid, shift=3.0, towards=towards, low=0.001, high=0.999))
    assert sigma.median().item() == pytest.approx(median, abs=0.02)


def test_draws_keep_to_their_bounds():
    sigma = drawn(SigmaDraws(grid="logit_normal", std=5.0, low=0.1, high=0.6))
    assert sigma.min().item() == pytest.approx(0.1)
    assert sigma.max().item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": 1.0}, "grid='logit_normal', or leave them out"),
        ({"grid": "rollout", "shift": 3.0}, "grid='uniform' or 'logit_normal'"),
        ({"grid": "logit_normal", "steps": (0, 2)}, "bounded by low and high"),
        ({"grid": "logit_normal", "std": 0.0}, "std"),
    ],
)
def test_draws_that_make_no_sense_are_refused(options, words: str):
    with pytest.raises(ValueError, match=words):
        SigmaDraws(**options)


@pytest.mark.parametrize(
    ("decay", "at"),
    [
        ({"type": "ConstantDecay", "decay": 0.5}, {0: 0.5, 100: 0.5}),
        ({"type": "PowerDecay", "decay": 0.9, "warmup": 10}, {0: 0.1, 10: 11 / 20, 1000: 0.9}),
        ({"type": "LinearDecay", "decay": 0.8, "initial": 0.2, "warmup": 10}, {0: 0.2, 5: 0.5, 10: 0.8, 99: 0.8}),
        ({"type": "PiecewiseLinearDecay", "decay": 0.5, "flat": 5, "rate": 0.1}, {4: 0.0, 7: 0.2, 50: 0.5}),
        ({"type": "CosineDecay", "decay": 0.9, "initial": 0.1, "total": 10}, {0: 0.1, 5: 0.5, 10: 0.9}),
        ({"type": "WarmupCosineDecay", "decay": 0.9, "initial": 0.1, "warmup": 2, "total": 12}, {1: 0.05, 7: 0.5}),
    ],
)
@pytest.mark.parametrize("objective", ["DiffusionNFT", "CRD", "DGPO", "AWM"])
def test_decays_are_parts_that_recipes_name(decay, at: dict[int, float], objective: str):
    part = build_part(Objective, {"type": objective, "decay": decay})
    for step, value in at.items():
        assert part.old_decay(step) == pytest.approx(value)


def test_published_decays_stay_the_default():
    assert [DiffusionNFT().old_decay(step) for step in (0, 200, 900)] == [0.0, 0.2, 0.5]
    assert [AWM().old_decay(step) for step in (0, 200, 900)] == [0.0, 0.2, 0.3]


def test_a_decay_is_set_from_the_command_line_and_checked():
    recipe = load_recipe("star-nft-shapes", ["objective.decay={type: LinearDecay, decay: 0.9, warmup: 20}"])
    assert recipe.objective.old_decay(10) == pytest.approx(0.45)
    with pytest.raises(ConfigError, match="warm-up must be shorter"):
        load_recipe("star-nft-shapes", ["objective.decay={type: WarmupCosineDecay, warmup: 20, total: 10}"])
