"""Noise predictions as velocities: against a flow whose velocity is known, and what the documentation shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlt2i.functional.epsilon import ddim_timesteps, nearest_timestep, scaled_linear_alpha_bars, vp_sigma
from rlt2i.interfaces import RolloutRequest
from rlt2i.policies.epsilon import Prediction, VPPolicy, VPSchedule
from rlt2i.samplers.kernels import DDIM
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from rlt2i.seeds import RolloutNoise
from rlt2i.types import Conditioning
from tests.helpers.toy import SIDE, ToyPolicy

MEAN, SPREAD = 0.5, 0.3


class Gaussian(VPPolicy, ToyPolicy):
    """What a perfect network says of clean latents N(MEAN, SPREAD^2)."""

    def __init__(self, prediction: Prediction) -> None:
        ToyPolicy.__init__(self)
        self.known = VPSchedule(alpha_bars=scaled_linear_alpha_bars(), prediction=prediction, steps_offset=1)

    @property
    def schedule(self) -> VPSchedule:
        return self.known

    def predict(self, x_vp: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        alpha_bar = self.schedule.alpha_bars[timesteps].view(-1, 1, 1, 1)
        alpha, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + s**2)
        clean = MEAN + gain * (x_vp - alpha * MEAN)
        epsilon = (x_vp - alpha * clean) / s
        return epsilon if self.schedule.prediction == "epsilon" else alpha * epsilon - s * clean


def conditioning(rows: int) -> Conditioning:
    return Conditioning(tensors={"none": torch.zeros(1, 1)}, rows=torch.zeros(rows, dtype=torch.long))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_velocity_is_that_of_the_flow(prediction: Prediction):
    policy = Gaussian(prediction)
    sigma = vp_sigma(policy.schedule.alpha_bars[[981, 500, 100]])
    x = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    s = sigma.view(-1, 1, 1, 1)
    clean = MEAN + SPREAD**2 * (1 - s) / (SPREAD**2 * (1 - s) ** 2 + s**2) * (x - (1 - s) * MEAN)
    expected = (x - clean) / s  # v = eps - x_0 and x = (1 - s) x_0 + s eps
    torch.testing.assert_close(policy.velocity(x, sigma, conditioning(3)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", [ODE(num_steps=200), SDE(num_steps=200, kernel=DDIM(eta=1.0))])
def test_what_is_drawn_has_the_distribution_of_the_data(prediction: Prediction, sampler):
    policy, count = Gaussian(prediction), 16
    noise = RolloutNoise(range(count), range(count, 2 * count))
    request = RolloutRequest(noise=noise, captures=frozenset(), image_size=SIDE)
    drawn = sampler.rollout(policy, conditioning(count), request).clean_latents
    # 3072 numbers: standard errors .005 and .004, and an error of the order of the step, which shrinks the spread.
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(drawn.std()) == pytest.approx(SPREAD, abs=0.02)


def test_timesteps_by_hand():
    assert ddim_timesteps(4).tolist() == [750, 500, 250, 0]
    assert ddim_timesteps(4, steps_offset=1).tolist() == [751, 501, 251, 1]
    assert ddim_timesteps(3, steps_offset=1).tolist() == [667, 334, 1]
    assert ddim_timesteps(4, spacing="trailing").tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError, match="num_steps=0"):
        ddim_timesteps(0)
    with pytest.raises(ValueError, match="the first timestep would be 1000"):
        ddim_timesteps(1000, steps_offset=1)


def test_a_level_is_told_as_the_nearest_timestep():
    alpha_bars = torch.tensor([0.9, 0.5, 0.1])  # sigma .25, .5, .75
    torch.testing.assert_close(vp_sigma(alpha_bars), torch.tensor([0.25, 0.5, 0.75]))
    found = nearest_timestep(torch.tensor([0.0, 0.3, 0.45, 0.75, 1.0]), alpha_bars)
    assert found.tolist() == [0, 0, 1, 2, 2]


def test_the_policy_of_the_documentation_is_one():
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    (block,) = re.findall(r"```python\n((?:(?!```).)*?class NoisePredictor.*?)```", page, flags=re.DOTALL)
    defined: dict[str, object] = {}
    exec(compile(block, "extending.md", "exec"), defined)

    class Whole(defined["NoisePredictor"], ToyPolicy):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.network = lambda x_vp, timesteps, embeddings: x_vp * timesteps.view(-1, 1, 1, 1) / 1000

    policy = Whole()
    rows = Conditioning(tensors={"embeddings": torch.zeros(1, 1)}, rows=torch.zeros(2, dtype=torch.long))
    request = RolloutRequest(noise=RolloutNoise([0, 1], [2, 3]), captures=frozenset(), image_size=SIDE)
    trajectory = ODE(num_steps=5).rollout(policy, rows, request)
    assert trajectory.sigmas.tolist() == policy.schedule.sigmas(5).tolist()
