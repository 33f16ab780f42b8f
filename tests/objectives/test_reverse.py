"""GRPO-Guard, Flow-DPPO and REINFORCE: by hand, and off policy."""

from __future__ import annotations

import pytest
import torch

from rlt2i.functional.gaussian import kl_map, log_prob_map
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.dppo import FlowDPPO
from rlt2i.objectives.grpo_guard import GRPOGuard
from rlt2i.objectives.penalty import KLPenalty
from rlt2i.objectives.reinforce import Reinforce
from rlt2i.types import Experience
from tests.helpers.build import collect, toy_algorithm, toy_engine, toy_learner
from tests.helpers.objective_cases import STAR, WINDOW, assert_same, experience_for, gradient


def after_a_move(objective) -> tuple:
    """A learner whose policy moved by 0.05 everywhere since the rollout, the rollout, and the off-policy loss."""
    algorithm = toy_algorithm(objective, sampler=WINDOW)
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    learner = toy_learner(algorithm)
    with torch.no_grad():
        algorithm.policy.image.add_(0.05)
    context = learner._context(experience.num_rollouts, 2, 3 * experience.num_rollouts, on_policy=False)
    return learner, experience, list(objective.losses(algorithm.policy, experience, context=context))


def steps_of(experience: Experience, t: int, image: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, std, length) of step t under a policy that is the fresh one plus a constant image."""
    algorithm = toy_algorithm(Reinforce(), sampler=WINDOW)
    trajectory, rows = experience.trajectory, torch.arange(experience.num_rollouts)
    pairs = experience.step_batch(rows, torch.full_like(rows, t))
    with torch.no_grad():
        velocity = algorithm.policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning) + image
    step = trajectory.kernel.transition(
        pairs.latents, velocity, pairs.sigma, pairs.sigma_next, sigma_max=trajectory.sigma_max
    )
    return step.mean, step.std, pairs.sigma - pairs.sigma_next


def test_guard_by_hand():
    # The formula of the paper, one rollout and step at a time.
    objective = GRPOGuard(clip_range=1e6)
    _, experience, losses = after_a_move(objective)
    expected = 0.0
    for t in range(3):
        (mean, std, length), (old, _, _) = steps_of(experience, t, 0.05), steps_of(experience, t, 0.0)
        reached = experience.trajectory.latents[:, t + 1]
        log_ratio = (log_prob_map(reached, mean, std) - log_prob_map(reached, old, std)).mean(dim=(1, 2))
        bias = kl_map(mean, old, std).mean(dim=(1, 2))
        ratio = torch.exp((log_ratio + bias) * std.flatten())
        expected += float((-experience.credit.advantage.flatten() * ratio / length).sum()) / (3 * 8)
    assert sum(float(loss.value.detach()) for loss in losses) == pytest.approx(
        expected, rel=1e-3
    )  # the advantages nearly cancel


def test_guard_centres_the_log_ratio():
    # Over many coordinates the mean of the plain log-ratio is minus the KL; the guarded one has mean 0.
    _, experience, losses = after_a_move(GRPOGuard(clip_range=1e6))
    bias = torch.cat([loss.metrics["guard/bias"] for loss in losses])
    plain = torch.stack(
        [
            (
                log_prob_map(experience.trajectory.latents[:, t + 1], *steps_of(experience, t, 0.05)[:2])
                - log_prob_map(experience.trajectory.latents[:, t + 1], *steps_of(experience, t, 0.0)[:2])
            ).mean(dim=(1, 2))
            for t in range(3)
        ],
        dim=1,
    ).flatten()
    assert (bias > 0).all()
    spread = float(plain.std()) / len(plain) ** 0.5
    assert abs(float((plain + bias).mean())) < 4 * spread


def test_dividing_by_the_length_of_a_step_is_the_only_difference():
    # Even sigmas: every step has length 1/6.
    experience = experience_for(GRPOGuard())
    with_it = gradient(GRPOGuard(clip_range=1.0), experience)
    without = gradient(GRPOGuard(clip_range=1.0, inverse_dt=False), experience)
    assert_same({k: 6 * v for k, v in without.items()}, with_it)


@pytest.mark.parametrize("ratio", ["sample", "location"])
def test_dppo_masks_what_moves_further_away(ratio):
    near, far = FlowDPPO(threshold=1e6, ratio=ratio), FlowDPPO(threshold=1e-12, ratio=ratio)
    (_, _, open_losses), (_, experience, masked) = after_a_move(near), after_a_move(far)
    assert all(not loss.metrics["clip/high"].any() and not loss.metrics["clip/low"].any() for loss in open_losses)
    high = torch.cat([loss.metrics["clip/high"] for loss in masked])
    low = torch.cat([loss.metrics["clip/low"] for loss in masked])
    advantage = experience.credit.advantage.flatten().repeat_interleave(3)
    assert (high > 0).any()
    assert (low > 0).any()
    assert (advantage[high > 0] > 0).all()
    assert (advantage[low > 0] < 0).all()


def test_dppo_divergence_by_hand():
    _, experience, losses = after_a_move(FlowDPPO())
    divergence = torch.cat([loss.metrics["kl/old"] for loss in losses]).view(8, 3)
    for t in range(3):
        (mean, std, _), (old, _, _) = steps_of(experience, t, 0.05), steps_of(experience, t, 0.0)
        by_hand = (mean - old).pow(2).mean(dim=(1, 2, 3)) / (2 * std.flatten() ** 2)
        torch.testing.assert_close(divergence[:, t], by_hand, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("objective", [GRPOGuard(), FlowDPPO()], ids=["guard", "dppo"])
def test_the_old_policy_is_the_one_that_collected_the_data(objective):
    algorithm = toy_algorithm(objective, sampler=WINDOW)
    learner, engine = toy_learner(algorithm, optimizer_steps_per_iteration=2, learning_rate=1e-3), toy_engine(algorithm)
    for update in range(2):
        experience = collect(engine, update=update, prompts=2, group_size=4).experience
        assert float(learner.sets.distance("old")) == 0  # at every rollout
        metrics = learner.learn(experience)
        assert metrics["ratio/abs_minus_one_max"] > 0  # the second optimiser step is off policy


def test_reinforce_has_the_on_policy_gradient_of_the_surrogate():
    experience = experience_for(Reinforce(), STAR)
    assert_same(gradient(Reinforce(), experience), gradient(ClippedSurrogate(), experience))


def test_reinforce_refuses_stale_rollouts():
    algorithm = toy_algorithm(Reinforce(), sampler=WINDOW)
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    with pytest.raises(ValueError, match="optimizer_steps_per_iteration=1, or ClippedSurrogate"):
        toy_learner(algorithm, optimizer_steps_per_iteration=2).learn(experience)


@pytest.mark.parametrize("where", ["uniform", "credit", "inverse"])
def test_a_penalty_has_its_own_map(where):
    # The policy moved by the same amount everywhere, so a mean-one map leaves the distance and moves its gradient.
    objective = ClippedSurrogate(kl_penalty=KLPenalty(weight=1.0, form="v", where=where))
    algorithm = toy_algorithm(objective, credit=STAR, sampler=WINDOW)
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    learner = toy_learner(algorithm)
    with torch.no_grad():
        algorithm.policy.image.add_(0.1)
    context = learner._context(experience.num_rollouts, 2, on_policy=True)
    for loss in objective.losses(algorithm.policy, experience, context=context):
        torch.testing.assert_close(loss.metrics["kl/reference"], torch.full((24,), 0.01), rtol=1e-3, atol=0)
