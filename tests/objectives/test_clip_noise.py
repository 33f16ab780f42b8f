"""A clip range is stated for a plain mean; a map inside the mean makes it noisier, and the range follows."""

from __future__ import annotations

from types import SimpleNamespace

import attrs
import pytest
import torch

from rlt2i.objectives.awm import AWM
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.grpo_guard import GRPOGuard
from rlt2i.objectives.reverse import at_ratio_grid
from tests.helpers.build import collect, toy_algorithm, toy_engine, toy_learner
from tests.helpers.objective_cases import sampler_for, with_credit


@pytest.mark.parametrize("grid", [(1, 1), (2, 2)])
def test_a_third_of_the_ratios_lies_beyond_one_sigma_whatever_the_map(grid):
    # An oracle of a quarter, twice: 4 inside, 0 outside, and the same cells as a mask. mean w^2 = 4.
    draw = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(10000, 16, 16, generator=draw)
    oracle = torch.zeros(1, 16, 16)
    oracle[:, ::2, ::2] = 4.0
    one_sigma = (grid[0] * grid[1] / 256) ** 0.5
    ones, everywhere = torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
    for weight, mask in ((ones, everywhere), (oracle, everywhere), (ones, oracle > 0)):
        pooled = at_ratio_grid(log_ratio, SimpleNamespace(weight=weight, mask=mask), grid)
        beyond = (pooled.values.abs() > one_sigma * pooled.noise).float().mean().item()
        assert beyond == pytest.approx(0.317, abs=0.02)
    assert pooled.noise.unique().tolist() == [2.0]


def test_a_map_at_the_grid_of_the_ratio_changes_no_range():
    weight = torch.rand(3, 4, 4)
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    for grid in ((4, 4), (8, 8)):
        pooled = at_ratio_grid(torch.randn(3, 8, 8), SimpleNamespace(weight=weight, mask=mask), grid)
        assert pooled.noise.unique().tolist() == [1.0]
        assert pooled.weight.shape[1:] == torch.Size(grid)


OBJECTIVES = [
    ClippedSurrogate(ratio="sample"),
    ClippedSurrogate(ratio="token"),
    GRPOGuard(ratio="sample"),
    AWM(ratio="sample", ema_kl_weight=0, weighting="uniform"),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda part: f"{type(part).__name__}-{part.ratio}")
def test_three_times_the_weight_is_three_times_the_noise_and_clips_as_often(objective):
    algorithm = toy_algorithm(objective, sampler=sampler_for(objective))
    collected = attrs.evolve(collect(toy_engine(algorithm), prompts=2, group_size=8).experience, token_grid=(2, 2))
    context = toy_learner(algorithm)._context(16, 2, 48, on_policy=False)
    with torch.no_grad():
        algorithm.policy.image.add_(0.02)

    def mean_of(name: str, clip_range: float, weight: float) -> float:
        experience = with_credit(
            collected, weight=torch.full((16, 1, *collected.trajectory.latents.shape[-2:]), weight)
        )
        losses = attrs.evolve(objective, clip_range=clip_range).losses(algorithm.policy, experience, context=context)
        return torch.cat([loss.metrics[name] for loss in losses]).mean().item()

    typical = mean_of("ratio/abs_log", 1.0, 1.0) / (2 if objective.ratio == "token" else 1)
    for end in ("clip/high", "clip/low"):
        share = mean_of(end, typical, 1.0)
        assert 0.02 < share < 0.98
        assert mean_of(end, typical, 3.0) == pytest.approx(share, abs=0.02)
