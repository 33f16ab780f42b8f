"""Allocations and masks on paper."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch

from rlt2i.credit.feature_saliency import FeatureSaliency, principal_saliency
from rlt2i.credit.gradient_rectification import GradientRectification
from rlt2i.credit.influence import Influence
from rlt2i.credit.inverse_dt import InverseDt
from rlt2i.credit.noise_aware import NoiseAware
from rlt2i.credit.proportional_dt import ProportionalDt
from rlt2i.credit.random_subset import RandomSubset
from rlt2i.credit.random_window import RandomWindow
from rlt2i.credit.region_maps import RegionMaps, coverage
from rlt2i.credit.relative_l1_chunks import RelativeL1Chunks
from rlt2i.credit.residual_contrast import ResidualContrast
from rlt2i.credit.sliding_window import SlidingWindow
from rlt2i.interfaces import RewardOutput
from rlt2i.samplers.kernels import FlowSDE
from rlt2i.samplers.mixed import SlidingSDE
from rlt2i.types import Region
from tests.helpers.credit_contexts import make_context


def close(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- time


def with_sigmas(sigmas: list[float], stochastic: list[int]):
    context = make_context([0.0, 1.0], group_size=2, num_steps=len(sigmas) - 1, stochastic=stochastic)
    return attrs.evolve(context, trajectory=attrs.evolve(context.trajectory, sigmas=torch.tensor(sigmas)))


def test_weights_by_step_size_by_hand():
    # Steps .2, .4, .4; the last is not trained and keeps weight one.
    context = with_sigmas([1.0, 0.8, 0.4, 0.0], [0, 1])
    close(InverseDt().weight(context).flatten(), [4 / 3, 2 / 3, 1.0])
    close(ProportionalDt().weight(context).flatten(), [2 / 3, 4 / 3, 1.0])
    # Nothing is stochastic: all steps can be trained. 1/.2, 1/.4, 1/.4 over their mean 10/3; .2, .4, .4 over 1/3.
    deterministic = with_sigmas([1.0, 0.8, 0.4, 0.0], [])
    close(InverseDt().weight(deterministic).flatten(), [1.5, 0.75, 0.75])
    close(ProportionalDt().weight(deterministic).flatten(), [0.6, 1.2, 1.2])


def test_noise_aware_weights_by_hand():
    # Flow-SDE: std = a sqrt(sigma / (1 - sigma)) sqrt(-dt). At .8 and .5: 2 sqrt(.3) and 1 sqrt(.5), any a.
    first, second = 2 * 0.3**0.5, 0.5**0.5
    mean = (first + second) / 2
    context = with_sigmas([1.0, 0.8, 0.5, 0.0], [1, 2])
    close(NoiseAware().weight(context).flatten(), [1.0, first / mean, second / mean])
    with pytest.raises(ValueError, match=r"NoiseAware: the rollout is deterministic.*such as SDE"):
        NoiseAware().weight(with_sigmas([1.0, 0.5, 0.0], []))


def test_rectified_weights_by_hand():
    # Flow-SDE at a = 1 pulls with sqrt(-dt) (1 / s + s (1 - sigma) / (2 sigma)), s^2 = sigma / (1 - sigma): from .8 to
    # .5 s = 2 and the force is sqrt(.3) (.5 + .25); from .5 to 0 s = 1 and it is sqrt(.5) (1 + .5).
    first, second = 1 / (0.3**0.5 * 0.75), 1 / (0.5**0.5 * 1.5)
    mean = (first + second) / 2
    context = with_sigmas([1.0, 0.8, 0.5, 0.0], [1, 2])
    context = attrs.evolve(context, trajectory=attrs.evolve(context.trajectory, kernel=FlowSDE(noise_level=1.0)))
    close(GradientRectification().weight(context).flatten(), [1.0, first / mean, second / mean])
    with pytest.raises(ValueError, match=r"GradientRectification: the rollout is deterministic.*such as SDE"):
        GradientRectification().weight(with_sigmas([1.0, 0.5, 0.0], []))


def test_chunks_weigh_the_same_whatever_their_length():
    # Relative changes 1, 1, 1, then 1/4: chunks of 3 and 1 steps, each half of 4 steps' worth.
    latents = torch.ones(2, 5, 2, 4, 4) * torch.tensor([1.0, 2.0, 4.0, 8.0, 10.0]).view(1, 5, 1, 1, 1)
    context = make_context([0.0, 1.0], group_size=2, latents=latents, stochastic=(0, 1, 2, 3))
    close(RelativeL1Chunks(num_chunks=2).weight(context).flatten(), [2 / 3, 2 / 3, 2 / 3, 2.0])
    close(RelativeL1Chunks(num_chunks=1).weight(context).flatten(), [1.0] * 4)
    close(RelativeL1Chunks(num_chunks=4).weight(context).flatten(), [1.0] * 4)
    window = make_context([0.0, 1.0], group_size=2, latents=latents, stochastic=(2, 3))
    with pytest.raises(ValueError, match=r"2 steps are trained.*Use num_chunks <= 2"):
        RelativeL1Chunks(num_chunks=3).weight(window)


# ------------------------------------------------------------------------------------------------------------- windows


def test_sliding_window_by_hand():
    part = SlidingWindow(width=2, period=2)
    seen = []
    for iteration in range(7):
        context = make_context([0.0, 1.0], group_size=2, num_steps=6, stochastic=(1, 2, 4), iteration=iteration)
        seen.append(part.mask(context).flatten().nonzero().flatten().tolist())
    assert seen == [[1, 2], [1, 2], [2, 4], [2, 4], [4], [4], [1, 2]]


def test_a_sliding_window_hurries_over_cleaner_steps():
    # Four places; from 8 batches at the first to 2 = 8 // 4 at none: 8, 6.5, 5, 3.5, rounded down.
    part, seen = SlidingWindow(width=1, period=8, pace="linear"), []
    for iteration in range(8 + 6 + 5 + 3):
        context = make_context([0.0, 1.0], group_size=2, num_steps=4, stochastic=(0, 1, 2, 3), iteration=iteration)
        seen += part.mask(context).flatten().nonzero().flatten().tolist()
    assert [seen.count(place) for place in range(4)] == [8, 6, 5, 3]
    assert SlidingSDE(num_steps=5, width=1, period=8, pace="linear").stochastic_steps(8 + 6) == (2,)


def test_random_window_is_the_same_on_every_process():
    places = set()
    for seed in range(20):
        context = make_context([0.0, 1.0], group_size=2, num_steps=5, stochastic=(0, 1, 2, 3), seed=seed)
        chosen = RandomWindow(width=2).mask(context).flatten().nonzero().flatten().tolist()
        places.add(tuple(chosen))
    assert places == {(0, 1), (1, 2), (2, 3)}
    other = attrs.evolve(context, gather=lambda tensor: torch.tensor([1, int(tensor)]))
    assert RandomWindow(width=2).mask(other).flatten().nonzero().flatten().tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"only 4 steps can be trained. Use width <= 4"):
        RandomWindow(width=5).mask(context)


def test_random_subset_draws_for_each_rollout():
    context = make_context([0.0] * 16, group_size=4, num_steps=6, stochastic=(0, 1, 2, 3, 4))
    mask = RandomSubset(fraction=0.6).mask(context)[:, :, 0, 0]
    assert mask.sum(dim=1).tolist() == [3] * 16
    assert not mask[:, 5].any()
    assert len({tuple(row) for row in mask.tolist()}) > 3
    assert RandomSubset(fraction=0.01).mask(context).sum() == 16  # never none


# --------------------------------------------------------------------------------------------------------------- space


def test_coverage_by_box_and_by_mask():
    box = Region(box=(0.25, 0.0, 0.75, 0.5), credit=1.0)
    close(coverage(box, (2, 2)), [[0.5, 0.5], [0.0, 0.0]])
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, :2] = True
    close(coverage(Region(box=(0, 0, 1, 1), credit=1.0, mask=mask), (2, 2)), [[0.5, 0.0], [0.0, 0.0]])


def test_region_maps_praise_what_helped_and_blame_what_hurt():
    left = Region(box=(0.0, 0.0, 0.5, 1.0), credit=1.0)
    right = Region(box=(0.5, 0.0, 1.0, 1.0), credit=-2.0)
    context = make_context([1.0, 0.0, 0.5], group_size=3, regions=[[left, right], [left, right], []])
    weight = RegionMaps(mix=1.0, floor=0.25).weight(context)
    # 1 inside and 0 outside, plus .25, over their mean .75; the third rollout is at the mean of its group.
    close(weight[0, 0], [[5 / 3, 1 / 3], [5 / 3, 1 / 3]])
    close(weight[1, 0], [[1 / 3, 5 / 3], [1 / 3, 5 / 3]])
    assert (weight[2] == 1).all()
    # All regions by size of judgement: 1/2 on the left, 1 on the right, plus .25 over their mean 1.
    both = RegionMaps(signs="all", mix=1.0, floor=0.25).weight(context)
    close(both[0, 0], [[0.75, 1.25], [0.75, 1.25]])
    close(RegionMaps(mix=0.5, floor=0.25).weight(context)[0, 0], [[4 / 3, 2 / 3], [4 / 3, 2 / 3]])


def test_residual_contrast_by_hand():
    # The image is 0 everywhere; predictions are off by 1 in the left half of one rollout, by 1 everywhere in the other.
    context = make_context([1.0, 0.0, 1.0, 1.0], group_size=2, num_steps=1, stochastic=(0,))
    predictions = torch.ones(4, 1, 2, 4, 4)
    predictions[0, ..., 2:] = 0
    latents = torch.zeros(4, 2, 2, 4, 4)
    trajectory = attrs.evolve(context.trajectory, latents=latents, captures={"clean_predictions": predictions})
    weight = ResidualContrast(mix=1.0, floor=0.25).weight(attrs.evolve(context, trajectory=trajectory))
    # They differ on the right: 0 and 1, plus .25, over their mean .75; the other group is tied.
    close(weight[0, 0], [[1 / 3, 5 / 3], [1 / 3, 5 / 3]])
    assert torch.equal(weight[0], weight[1])
    assert (weight[2:] == 1).all()


def test_influence_finds_the_places_that_decide():
    # The score reads the top left token only, so noise anywhere else changes nothing.
    context = make_context([1.0, 0.0, 2.0, 2.0], group_size=2, stochastic=(0, 2))
    weight = Influence(blocks=2, mix=1.0, floor=0.25).weight(context)
    # 1 in one of four cells, plus .25, over their mean .5.
    for step in (0, 2):
        close(weight[:2, step], [[[2.5, 0.5], [0.5, 0.5]]] * 2)
    assert (weight[:, [1, 3]] == 1).all()  # nothing random happened there
    assert (weight[2:] == 1).all()  # a tied group is not measured


def test_influence_counts_its_budget_and_survives_failed_rewards():
    asked = []

    def failing(latents: torch.Tensor, rollouts: torch.Tensor) -> RewardOutput:
        asked.append(len(rollouts))
        return RewardOutput(scores=torch.full((len(rollouts),), torch.nan), valid=torch.zeros(len(rollouts)) > 0)

    context = make_context([1.0, 0.0, 2.0, 2.0], group_size=2, stochastic=(0, 1))
    weight = Influence(blocks=2, draws=3).weight(attrs.evolve(context, score=failing))
    assert (weight == 1).all()
    assert asked == [2] * (2 * (2 * 2 * 3 + 1))
    with pytest.raises(ValueError, match="Use blocks <= 2"):
        Influence(blocks=4).weight(context)


def test_principal_saliency_points_at_the_object():
    # One direction of features: 1 in a patch of the middle, 0 elsewhere. Two images, the second inverted, the third
    # flat.
    features = torch.zeros(3, 4, 4, 5)
    features[0, 1, 2, 3] = 1.0
    features[1] = 1.0
    features[1, 1, 2, 3] = 0.0
    saliency = principal_saliency(features, 3)
    expected = torch.zeros(4, 4)
    expected[1, 2] = 1.0
    torch.testing.assert_close(saliency[0], expected, atol=1e-5, rtol=0)
    assert saliency[1].argmax() == expected.argmax()
    assert (saliency[2] == 0).all()


def test_principal_components_count_by_their_variance():
    # Two independent directions: columns differ by 3, rows by 1, so their variances are 9 to 1.
    features = torch.zeros(1, 2, 2, 2)
    features[0, :, 1, 0] = 3.0
    features[0, 1, :, 1] = 1.0
    saliency = principal_saliency(features, 2)[0]
    assert sorted(round(float(value), 3) for value in saliency.flatten()) == [0.0, 0.1, 0.9, 1.0]


@pytest.fixture(scope="module")
def tiny_transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random vision transformer on disk, as timm saves it."""
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
        network = timm.create_model("vit_tiny_patch16_224", **sizes)
    folder = tmp_path_factory.mktemp("vit")
    save_for_hf(network, str(folder), model_args=sizes, safe_serialization=True)
    return folder


def test_feature_saliency_reads_a_transformer_from_a_folder(tiny_transformer: Path):
    part = FeatureSaliency(model=str(tiny_transformer), resolution=32, mix=1.0)
    context = make_context([0.0, 1.0], group_size=2)
    images = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    images[0, :, 4:12, 4:12] = 255
    weight = part.weight(attrs.evolve(context, images=images))
    assert weight.shape == (2, 1, 2, 2)
    assert weight[0].std() > 0
    torch.testing.assert_close(weight.mean(dim=(2, 3)), torch.ones(2, 1))
    assert torch.equal(weight, part.weight(attrs.evolve(context, images=images)))
    uniform = attrs.evolve(part, mix=0.0).weight(context)
    assert (uniform == 1).all()
