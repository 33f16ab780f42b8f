"""The forms of a ratio per place: by hand, and what ties them to the ratio of a whole sample."""

from __future__ import annotations

import math

import attrs
import pytest
import torch

from rlt2i.functional.surrogate import clipped_surrogate, detached_log_ratio, scaled_clip_range
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from tests.helpers.build import collect, toy_algorithm, toy_engine, toy_learner
from tests.helpers.objective_cases import WINDOW, assert_same, experience_for, gradient, with_credit

DETACHED = ClippedSurrogate(clip_range=1e-2, form="detached")
SAMPLE = ClippedSurrogate(clip_range=1e-2, ratio="sample")


def test_detached_ratio_by_hand():
    # Log-ratios log 4 and 0, whole: log 2. Both places have the value 2; d rho_p / d l_p = 2, and nothing crosses.
    log_ratio = torch.tensor([[[math.log(4.0), 0.0]]], requires_grad=True)
    whole = log_ratio.mean(dim=(1, 2), keepdim=True)
    ratio = detached_log_ratio(log_ratio, whole).exp()
    torch.testing.assert_close(ratio.detach(), torch.full((1, 1, 2), 2.0))
    ratio[0, 0, 0].backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([[[2.0, 0.0]]]))


def test_a_detached_ratio_is_clipped_for_all_places_or_none():
    # The whole ratio is 2; only praised places are held back, though the second one's own ratio is 1.
    log_ratio = torch.tensor([[[math.log(4.0), 0.0]]])
    whole = torch.full((1, 1, 1), math.log(2.0))
    found = clipped_surrogate(detached_log_ratio(log_ratio, whole), torch.tensor([[[-1.0, 1.0]]]), 0.5)
    assert found.clipped_high.tolist() == [[[False, True]]]
    torch.testing.assert_close(found.loss, torch.tensor([[[2.0, -1.5]]]))


def off_policy(objective: ClippedSurrogate, **credit: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of an update after the policy moved."""
    algorithm = toy_algorithm(objective, sampler=WINDOW)
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    experience = with_credit(experience, **credit) if credit else experience
    learner = toy_learner(algorithm)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        image = algorithm.policy.image
        image.add_(0.05 * torch.randn(image.shape, generator=draw))
    context = learner._context(experience.num_rollouts, 2, 3 * experience.num_rollouts, on_policy=False)
    for loss in objective.losses(algorithm.policy, experience, context=context):
        loss.value.backward()
    return {k: p.grad for k, p in algorithm.policy.trainable_parameters().items() if p.grad is not None}


@pytest.mark.parametrize("ratio", ["token", "location"])
@pytest.mark.parametrize("clip_range", [1e-4, 1e6])
def test_without_maps_the_detached_form_is_the_ratio_of_the_sample_off_policy_too(ratio: str, clip_range: float):
    located = off_policy(attrs.evolve(DETACHED, ratio=ratio, clip_range=clip_range))
    assert_same(located, off_policy(attrs.evolve(SAMPLE, clip_range=clip_range)))
    direct = off_policy(ClippedSurrogate(ratio=ratio, clip_range=1e6))
    assert not torch.allclose(direct["image"], located["image"], rtol=1e-3, atol=0)


def test_on_policy_both_forms_have_the_gradient_of_signed_places():
    experience = experience_for(DETACHED)
    draw = torch.Generator().manual_seed(1)
    advantage = torch.randn(experience.num_rollouts, 1, 4, 4, generator=draw)
    signed = with_credit(experience, advantage=advantage)
    direct = gradient(ClippedSurrogate(clip_range=1e-2), signed)
    assert_same(gradient(DETACHED, signed), direct)
    scalar = gradient(SAMPLE, signed)  # it can only take the mean
    assert_same(scalar, gradient(SAMPLE, with_credit(experience, advantage=advantage.mean(dim=(2, 3), keepdim=True))))
    assert not torch.allclose(scalar["image"], direct["image"], rtol=1e-2, atol=0)


def test_places_without_advantage_have_no_gradient():
    # On policy d l / d image at a place is that place's alone, but for the toy network's neighbourhood.
    experience = experience_for(DETACHED)
    advantage = experience.credit.advantage.expand(-1, 1, 4, 4).clone()
    advantage[..., 2:] = 0
    found = gradient(DETACHED, with_credit(experience, advantage=advantage))["image"]
    side = found.shape[-1]
    assert found[..., side // 2 + 2 :].abs().sum() < 1e-3 * found.abs().sum()


def test_sums_over_channels_scale_ratio_and_range_alike():
    # C = 3 channels: three times the log-ratio, three times the range.
    experience = experience_for(SAMPLE)
    channels = experience.trajectory.latents.shape[2]
    summed = attrs.evolve(SAMPLE, channels="sum")
    assert_same(gradient(summed, experience), {k: channels * v for k, v in gradient(SAMPLE, experience).items()})
    assert scaled_clip_range(1e-4, 64 * 64, summed=16) == pytest.approx(1e-4 * 64 * 16)
    grid = (8, 8)
    ranges = {
        ("direct", "mean", "sample"): 8e-2, ("direct", "sum", "sample"): 24e-2, ("detached", "mean", "sample"): 1e-2,
        ("direct", "sum", "ratio"): 1e-2, ("direct", "mean", "ratio"): 1e-2,
    }  # fmt: skip
    for (form, how, at), expected in ranges.items():
        part = ClippedSurrogate(clip_range=1e-2, form=form, channels=how, clip_at=at)
        assert part._clip_range(grid, 3 if how == "sum" else 1) == pytest.approx(expected)


def test_vipos_objective_by_hand():
    # mean_p min(rho_p M_p A, clip(rho_p, 1 +- eps) M_p A), rho_p with log-probabilities summed over channels.
    vipo = ClippedSurrogate(ratio="location", channels="sum", clip_at="ratio", clip_range=0.2)
    algorithm = toy_algorithm(vipo, sampler=WINDOW)
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    side = experience.trajectory.latents.shape[-1]
    draw = torch.Generator().manual_seed(0)
    saliency = torch.rand(experience.num_rollouts, 1, side, side, generator=draw)
    experience = with_credit(experience, weight=saliency)
    learner = toy_learner(algorithm)
    with torch.no_grad():
        algorithm.policy.image.add_(0.05)
    context = learner._context(experience.num_rollouts, 2, 3 * experience.num_rollouts, on_policy=False)
    found = sum(float(loss.value.detach()) for loss in vipo.losses(algorithm.policy, experience, context=context))

    trajectory, expected = experience.trajectory, 0.0
    rows = torch.arange(experience.num_rollouts)
    for t in range(3):
        states = experience.step_batch(rows, torch.full_like(rows, t))
        with torch.no_grad():
            velocity = algorithm.policy.velocity(states.latents, states.sigma, states.conditioning)
        mean, std, _ = trajectory.transition(states.latents, velocity, states.sigma, states.sigma_next)
        density = torch.distributions.Normal(mean, std).log_prob(states.next_latents).sum(dim=1)
        channels = trajectory.latents.shape[2]
        ratio = torch.exp(density - channels * states.old_log_probs)
        place = saliency[:, 0] * experience.credit.advantage[:, 0]
        expected -= float(torch.minimum(ratio * place, ratio.clamp(0.8, 1.2) * place).mean()) / 3
    assert found == pytest.approx(expected, rel=1e-3)
