"""Image health without a reward, against images whose numbers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlt2i.evaluation.health import (
    colour_entropy,
    dark_fraction,
    diversity_metrics,
    edge_density,
    health_metrics,
    high_frequency_energy,
    mean_cosine_distance,
    pixel_features,
    saturation,
    vendi_score,
)


def _flat(red: int, green: int, blue: int, side: int = 8) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, side, side)


def _grey(luma: Tensor) -> Tensor:
    """[1, 3, H, W] from [H, W] in 0..255."""
    return luma.to(torch.uint8).expand(1, 3, *luma.shape)


_HALVES = _grey(torch.tensor([[0.0, 255.0]]).repeat_interleave(4, dim=1).expand(8, 8))  # black | white
_CHECKERS = _grey(255 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2))
_NOISE = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_edge_density_by_hand():
    # One of the 7 columns of differences steps from black to white; every pixel of a checkerboard does.
    torch.testing.assert_close(edge_density(_HALVES), torch.tensor([1 / 7]))
    assert edge_density(torch.cat([_flat(9, 99, 200), _CHECKERS])).tolist() == [0.0, 1.0]
    # A step of 20 / 255 = .078 is below the default threshold and above .05.
    step = _grey(torch.tensor([[100.0, 120.0]]).expand(2, 2))
    assert (edge_density(step).item(), edge_density(step, threshold=0.05).item()) == (0.0, 1.0)


def test_colour_entropy_by_hand():
    # One colour: 0 bits. Two equally frequent ones: 1 bit. Four: 2 bits.
    four = torch.cat([_flat(*c) for c in ((0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255))], dim=3)[..., ::4]
    torch.testing.assert_close(
        colour_entropy(torch.cat([_flat(1, 2, 3), _HALVES, four])), torch.tensor([0.0, 1.0, 2.0])
    )
    # Values 31 and 32 lie in different boxes of 8 levels, 32 and 63 in one.
    edge = torch.cat([_flat(31, 0, 0), _flat(32, 0, 0)], dim=3)
    within = torch.cat([_flat(32, 0, 0), _flat(63, 0, 0)], dim=3)
    torch.testing.assert_close(colour_entropy(torch.cat([edge, within])), torch.tensor([1.0, 0.0]))
    assert colour_entropy(_NOISE, levels=2).tolist() == pytest.approx([3.0] * 4, abs=0.01)


def test_saturation_by_hand():
    images = torch.cat([_flat(0, 0, 0), _flat(200, 200, 200), _flat(255, 0, 0), _flat(200, 150, 100)])
    torch.testing.assert_close(saturation(images), torch.tensor([0.0, 0.0, 1.0, 0.5]))


def test_dark_fraction_by_hand():
    # Pure blue has luma .114, above the threshold; a blue of 100 has .045.
    images = torch.cat([_HALVES, _flat(0, 0, 255), _flat(0, 0, 100)])
    assert dark_fraction(images).tolist() == [0.5, 0.0, 1.0]
    assert dark_fraction(images, threshold=0.2).tolist() == [0.5, 1.0, 1.0]


def test_high_frequency_energy_by_hand():
    # A checkerboard has all its energy at (1/2, 1/2), a cosine of period 8 at 1/8, a flat image none.
    wave = _grey(127 + 100 * torch.cos(torch.arange(8) * 2 * math.pi / 8).expand(8, 8))
    images = torch.cat([_CHECKERS, _flat(10, 200, 90), _flat(0, 0, 0)])
    torch.testing.assert_close(high_frequency_energy(images), torch.tensor([1.0, 0.0, 0.0]))
    assert high_frequency_energy(wave).item() < 1e-3  # what rounding to 256 grey levels leaves
    # A step between two halves, periodic: odd multiples k of 1/8 with energy 1 / sin^2(pi k / 8).
    near, far = 1 / math.sin(math.pi / 8) ** 2, 1 / math.sin(3 * math.pi / 8) ** 2
    assert high_frequency_energy(_HALVES).item() == pytest.approx(far / (near + far), rel=1e-4)
    # White noise fills the plane evenly; 33 of 64 frequencies a side lie within 1/4.
    assert high_frequency_energy(_NOISE).mean().item() == pytest.approx(1 - (33 / 64) ** 2, abs=0.02)


def test_grid_and_blur_move_in_opposite_directions():
    smooth = torch.nn.functional.avg_pool2d(_NOISE.float(), 9, stride=1, padding=4).to(torch.uint8)
    grid = smooth.clone()
    grid[..., ::2] = (grid[..., ::2].int() + 12).clamp(max=255).to(torch.uint8)
    assert (high_frequency_energy(grid) > 5 * high_frequency_energy(smooth)).all()
    assert (edge_density(smooth) < edge_density(_NOISE)).all()


def test_pixel_features_average_down():
    features = pixel_features(_HALVES, side=2)
    assert features.tolist() == [[-0.5, 0.5] * 6]


def test_mean_cosine_distance_by_hand():
    # Right angle 1, opposite 2, right angle 1: 4/3. Three copies, whatever their length: 0.
    features = torch.tensor([[1.0, 0], [0, 5], [-2, 0], [1, 1], [2, 2], [3, 3]])
    torch.testing.assert_close(mean_cosine_distance(features, 3), torch.tensor([4 / 3, 0.0]))


def test_vendi_score_by_hand():
    # Orthogonal: 3. Copies, whatever their length: 1. Two of one kind and one of another: eigenvalues 2/3,
    # 1/3.
    axes = torch.eye(3)
    copies = torch.tensor([1.0, 2, 3]).outer(torch.tensor([1.0, 2.0, 2.0]))
    mixed = torch.stack([axes[0], axes[0], axes[1]])
    expected = torch.tensor([3.0, 1.0, 3 / 2 ** (2 / 3)])  # exp(ln 3 - 2/3 ln 2)
    torch.testing.assert_close(vendi_score(torch.cat([axes, copies, mixed]), 3), expected)


def test_diversity_does_not_depend_on_the_order_within_a_group():
    features = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    turned = features.view(2, 4, 5).flip(1).flatten(0, 1)
    torch.testing.assert_close(mean_cosine_distance(turned, 4), mean_cosine_distance(features, 4))
    torch.testing.assert_close(vendi_score(turned, 4), vendi_score(features, 4))


def test_health_metrics_are_scalars_for_the_log():
    images = torch.cat([_HALVES, _HALVES, _CHECKERS, _flat(255, 0, 0)])
    found = health_metrics(images)
    assert len(found) == 5
    assert all(v.ndim == 0 and math.isfinite(v) for v in found.values())
    assert found["health/dark_fraction"].item() == pytest.approx((0.5 + 0.5 + 0.5 + 0.0) / 4)


def test_diversity_metrics_are_of_groups(monkeypatch):
    # Black and white halves, and black and white the other way round: opposite features. Copies: none.
    images = torch.cat([_HALVES, 255 - _HALVES, _HALVES, _HALVES])
    found = diversity_metrics(images, group_size=2)
    torch.testing.assert_close(found["diversity/cosine_distance"], torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(found["diversity/vendi"], torch.tensor([1.0, 1.0]))  # opposite is on one line
    monkeypatch.setattr("rlt2i.evaluation.health._IMAGES_PER_PASS", 3)
    torch.testing.assert_close(diversity_metrics(images, group_size=2), found)


def test_refusals():
    with pytest.raises(ValueError, match=r"got torch.float32 \[1, 3, 8, 8\], expected uint8"):
        edge_density(_HALVES.float())
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\]"):
        saturation(_HALVES[0])
    with pytest.raises(ValueError, match=r"\[4, 4\] with group_size=3"):
        vendi_score(torch.eye(4), 3)
    with pytest.raises(ValueError, match="group_size=1"):
        mean_cosine_distance(torch.eye(4), 1)
