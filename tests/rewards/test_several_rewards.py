"""Several rewards at once, from a recipe: their weighted sum, and GDPO of the same mapping."""

from __future__ import annotations

import pytest
import torch

from rlt2i.config import parse_yaml
from rlt2i.recipes import Recipe, recipe_from_mapping
from rlt2i.runs.metrics import read_metrics
from rlt2i.training.start import train
from tests.helpers.build import collect, toy_engine

RECIPE = """
name: several
policy: {type: "tests.helpers.toy:ToySpec"}
sampler: {type: SDE, num_steps: 4, window: [0, 2]}
reward:
  type: WeightedSum
  rewards:
    corner: [{type: "tests.helpers.toy:QuadrantBrightness"}, 1.0]
    size: [{type: Affine, reward: JPEGCompressibility, scale: 0.002}, 0.5]
    mine: [{type: Function, function: "tests.rewards.test_several_rewards:warmth", span: [0, 255]}, 0.1]
credit:
  type: Product
  advantage: {advantage}
objective: {type: ClippedSurrogate, clip_range: 1e-3}
task: {type: "tests.helpers.toy:ToyTask"}
train:
  {iterations: 1, prompts_per_iteration: 4, group_size: 4, rollout_batch_size: 16, micro_batch_size: 16, image_size: 8,
   learning_rate: 1e-2, eval_prompts: 0, trackers: []}
"""
SUM = "{type: GroupRelative}"
EACH = "{type: GDPO, weights: {corner: 1.0, size: 0.5, mine: -0.25}}"


def warmth(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> list[float]:
    """Mean of the red channel."""
    return [float(image[0].float().mean()) for image in images]


def recipe(advantage: str) -> Recipe:
    return recipe_from_mapping(parse_yaml(RECIPE.replace("{advantage}", advantage)))


@pytest.mark.parametrize("advantage", [SUM, EACH])
def test_a_run_learns_from_several_rewards_and_logs_each_of_them(tmp_path, advantage):
    train(recipe(advantage), tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run")
    total = line["reward/corner"] + 0.5 * line["reward/size"] + 0.1 * line["reward/mine"]
    assert line["reward/mean"] == pytest.approx(total, rel=1e-5)
    assert line["reward/size/raw"] == pytest.approx(500 * line["reward/size"], rel=1e-5)
    assert line["grad_norm"] > 0


def test_gdpo_compares_each_reward_on_its_own_scale():
    """By hand: every term centred and scaled in its group, weighted, added; the sum centred and scaled once more."""
    found = collect(toy_engine(recipe(EACH).algorithm().load()), group_size=4)
    terms = {name: found.experience.rewards.terms[name].double().view(4, 4) for name in ("corner", "size", "mine")}
    total = torch.zeros(4, 4, dtype=torch.float64)
    for name, weight in {"corner": 1.0, "size": 0.5, "mine": -0.25}.items():
        centred = terms[name] - terms[name].mean(dim=1, keepdim=True)
        total += weight * centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6)
    expected = (total - total.mean()) / (total - total.mean()).square().mean().sqrt()
    torch.testing.assert_close(
        found.experience.credit.advantage[:, 0, 0, 0].double().view(4, 4), expected, atol=1e-3, rtol=1e-3
    )
