"""The learner learns, its first ratio is 1, and the identity laws of STAR hold."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.algorithm import Algorithm
from rlt2i.credit.algebra import Allocation, Product
from rlt2i.credit.controls import Inverted, Oracle, Shuffled
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.step_gain import StepGain
from rlt2i.credit.text_attention import TextAttention
from rlt2i.functional.surrogate import scaled_clip_range
from rlt2i.interfaces import CreditAssigner, CreditContext, Objective, Sampler
from rlt2i.learner import UpdateRefused
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.draws import SigmaDraws
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.online_dpo import OnlineDPO
from rlt2i.samplers.kernels import CPS, DanceSDE, FlowSDE
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from tests.helpers.build import UNIFORM, collect, gradients, learning_curve, toy_algorithm, toy_engine, toy_learner
from tests.helpers.toy import QuadrantBrightness, ToySpec

ATTENTION = TextAttention(blocks="0", doubt=0.0)  # the toy maps are flat: keep them as they are


def product(*allocations: Allocation) -> Product:
    return Product(advantage=GroupRelative(), allocations=allocations)


CREDITS: dict[str, CreditAssigner] = {
    "uniform": UNIFORM,
    "star": product(ATTENTION),
    "shuffled": product(Shuffled(allocation=ATTENTION)),
    "inverted": product(Inverted(allocation=ATTENTION)),
    "oracle": product(Oracle()),
    "dense": Product(advantage=StepGain()),
    "star_dense": Product(advantage=StepGain(), allocations=(ATTENTION,)),
}
WINDOW = SDE(num_steps=6, window=(0, 3), kernel=FlowSDE(noise_level=0.9))
OBJECTIVES: dict[str, tuple[Objective, Sampler, float]] = {
    "clipped": (ClippedSurrogate(clip_range=1e-2), WINDOW, 0.1),
    "nft": (DiffusionNFT(), ODE(num_steps=6), 0.05),
    "dpo": (OnlineDPO(refresh_every=1), ODE(num_steps=6), 0.05),
}


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_credit_learns_under_every_objective(objective: str, credit: str):
    loss, sampler, rate = OBJECTIVES[objective]
    algorithm = toy_algorithm(loss, credit=CREDITS[credit], sampler=sampler)
    rewards = learning_curve(algorithm, updates=14, learning_rate=rate)
    # Before any learning the corner is as bright as the rest: reward 0.5.
    assert abs(rewards[0] - 0.5) < 0.02
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.005, rewards


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), CPS()], ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("ratio", ["sample", "token", "location"])
def test_first_ratio_is_exactly_one(kernel, ratio):
    algorithm = toy_algorithm(
        ClippedSurrogate(ratio=ratio), credit=CREDITS["star"], sampler=SDE(num_steps=6, window=(0, 5), kernel=kernel)
    )
    metrics = toy_learner(algorithm).learn(collect(toy_engine(algorithm)).experience)
    assert metrics["ratio/abs_minus_one_max"] == 0.0
    assert metrics["clip/high"] == 0.0
    assert metrics["clip/low"] == 0.0


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), CPS()], ids=lambda k: type(k).__name__)
def test_replayed_log_probs_equal_recorded_ones(kernel):
    algorithm = toy_algorithm(ClippedSurrogate(), sampler=SDE(num_steps=6, window=(0, 5), kernel=kernel))
    experience = collect(toy_engine(algorithm)).experience
    learner = toy_learner(algorithm, micro_batch_size=7)
    replayed = learner._replayed(experience)
    torch.testing.assert_close(replayed.trajectory.log_probs, experience.trajectory.log_probs, atol=2e-5, rtol=2e-5)


def test_second_update_is_off_policy_and_uses_replayed_log_probs():
    algorithm = toy_algorithm(ClippedSurrogate(clip_range=1e-3, ratio="sample"))
    learner = toy_learner(algorithm, optimizer_steps_per_iteration=2)
    metrics = learner.learn(collect(toy_engine(algorithm)).experience)
    assert metrics["ratio/abs_minus_one_max"] > 0  # the first update moved the weights
    assert learner.optimizer_step == 2


# ------------------------------------------------------------------------------------------- identity laws of STAR


def star_gradient(credit: CreditAssigner, objective: Objective) -> dict[str, torch.Tensor]:
    algorithm = toy_algorithm(objective, credit=credit)
    return gradients(toy_learner(algorithm), collect(toy_engine(algorithm)).experience)


@pytest.mark.parametrize(
    "objective", [ClippedSurrogate(ratio="sample"), ClippedSurrogate(ratio="location"), DiffusionNFT()]
)
def test_mix_zero_is_bit_equal_to_uniform_credit(objective):
    star = star_gradient(product(TextAttention(blocks="0", mix=0.0)), objective)
    uniform = star_gradient(UNIFORM, objective)
    for name in uniform:
        assert torch.equal(star[name], uniform[name])


def test_constant_map_gives_flow_grpos_on_policy_gradient_at_every_granularity():
    reference = star_gradient(UNIFORM, ClippedSurrogate(ratio="sample"))
    for ratio in ("token", "location"):
        found = star_gradient(product(TextAttention(blocks="0", mix=0.0)), ClippedSurrogate(ratio=ratio))
        for name in reference:
            torch.testing.assert_close(found[name], reference[name], atol=1e-7, rtol=1e-4)


def test_map_has_the_same_on_policy_gradient_at_every_granularity():
    reference = star_gradient(CREDITS["star"], ClippedSurrogate(ratio="location"))
    for ratio in ("token", "sample"):
        found = star_gradient(CREDITS["star"], ClippedSurrogate(ratio=ratio))
        for name in reference:
            torch.testing.assert_close(found[name], reference[name], atol=1e-7, rtol=1e-4)


def test_star_weights_have_mean_one_per_rollout_and_step():
    algorithm = toy_algorithm(ClippedSurrogate(), credit=CREDITS["star"])
    weight = collect(toy_engine(algorithm)).experience.credit.weight
    assert weight.shape == (32, 6, 4, 4)
    torch.testing.assert_close(weight.mean(dim=(2, 3)), torch.ones(32, 6))
    assert weight.std() > 0.01


@attrs.frozen(kw_only=True)
class Moved(Allocation):
    """A fixed map, optionally rolled by one token."""

    shift: int = 0

    def weight(self, context: CreditContext) -> torch.Tensor:
        base = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
        return torch.roll(base / base.mean(), self.shift, dims=3)


def test_permuting_locations_permutes_gradients():
    # The learned image enters v location by location, so its gradient is a map that must follow the credit map. The
    # gradient
    # of location p is weight_p times what it is under uniform credit.
    def image_gradient(shift: int) -> torch.Tensor:
        return star_gradient(product(Moved(shift=shift)), ClippedSurrogate())["image"]

    uniform = star_gradient(UNIFORM, ClippedSurrogate())["image"]
    for shift in (0, 1):
        weight = Moved(shift=shift).weight(None)[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1)  # type: ignore[arg-type]
        torch.testing.assert_close(image_gradient(shift), uniform * weight, atol=1e-8, rtol=1e-4)


def test_scaling_credit_scales_the_on_policy_gradient():
    algorithm = toy_algorithm(ClippedSurrogate())
    experience = collect(toy_engine(algorithm)).experience
    once = gradients(toy_learner(algorithm), experience)
    doubled = attrs.evolve(
        experience, credit=attrs.evolve(experience.credit, advantage=2 * experience.credit.advantage)
    )
    twice = gradients(toy_learner(algorithm), doubled)
    for name in once:
        torch.testing.assert_close(twice[name], 2 * once[name])


def test_clip_range_follows_the_granularity():
    # 64 latent locations: the noise of a mean over 1/64 of the coordinates is 8 times as large.
    assert scaled_clip_range(1e-4, 64) == pytest.approx(8e-4)


# --------------------------------------------------------------------------------------------------- invariances


def test_rollouts_do_not_depend_on_chunks_or_order():
    algorithm = toy_algorithm(ClippedSurrogate())
    whole = collect(toy_engine(algorithm, rollout_batch_size=64)).experience.trajectory
    chunked = collect(toy_engine(algorithm, rollout_batch_size=5)).experience.trajectory
    assert torch.equal(whole.latents, chunked.latents)
    second_half = collect(toy_engine(algorithm), prompts=2, first=2).experience.trajectory
    assert torch.equal(whole.latents[16:], second_half.latents)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_do_not_change_the_gradient(objective):
    loss, sampler, _ = OBJECTIVES[objective]
    algorithm = toy_algorithm(loss, sampler=sampler)
    experience = collect(toy_engine(algorithm)).experience
    whole = gradients(toy_learner(algorithm, micro_batch_size=1000), experience)
    small = gradients(toy_learner(algorithm, micro_batch_size=6), experience)
    for name in whole:
        torch.testing.assert_close(small[name], whole[name], atol=1e-6, rtol=1e-4)


def test_shared_initial_noise_is_shared_within_a_group_only():
    algorithm = toy_algorithm(ClippedSurrogate())
    start = collect(toy_engine(algorithm, share_initial_noise=True)).experience.trajectory.latents[:, 0]
    groups = start.view(4, 8, *start.shape[1:])
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert not torch.equal(groups[0, 0], groups[1, 0])


# ------------------------------------------------------------------------------------------------ degenerate input


@attrs.frozen(kw_only=True)
class Constant(QuadrantBrightness):
    """The same score for everything."""

    def score(self, batch, want=frozenset()):
        output = super().score(batch, want)
        return attrs.evolve(output, scores=torch.full_like(output.scores, 0.3))


@attrs.frozen(kw_only=True)
class Failing(QuadrantBrightness):
    """Every third image could not be scored."""

    def score(self, batch, want=frozenset()):
        output = super().score(batch, want)
        lost = torch.arange(len(output.scores)) % 3 == 0
        return attrs.evolve(output, scores=torch.where(lost, torch.nan, output.scores), valid=~lost)


def test_tied_groups_cost_nothing_and_change_nothing():
    algorithm = toy_algorithm(ClippedSurrogate(), reward=Constant())
    learner = toy_learner(algorithm)
    before = {k: v.clone() for k, v in learner.policy.trainable_parameters().items()}
    calls = []
    velocity = algorithm.policy.velocity
    experience = collect(toy_engine(algorithm)).experience
    algorithm.policy.velocity = lambda *a: calls.append(1) or velocity(*a)
    metrics = learner.learn(experience)
    assert not calls
    assert metrics["informative"] == 0
    assert metrics["grad_norm"] == 0
    assert all(torch.equal(before[k], v) for k, v in learner.policy.trainable_parameters().items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_invalid_rollouts_leave_statistics_and_loss(objective):
    loss, sampler, _ = OBJECTIVES[objective]
    algorithm = toy_algorithm(loss, sampler=sampler, reward=Failing())
    experience = collect(toy_engine(algorithm)).experience
    advantage = experience.credit.advantage.flatten()
    valid = experience.rewards.valid
    assert (advantage[~valid] == 0).all()
    for group in range(4):
        rows = slice(8 * group, 8 * group + 8)
        assert abs(float(advantage[rows][valid[rows]].mean())) < 1e-4
    metrics = toy_learner(algorithm).learn(experience)
    assert metrics["grad_norm"] > 0


def test_non_finite_gradient_is_refused_and_leaves_no_trace():
    algorithm = toy_algorithm(ClippedSurrogate())
    learner = toy_learner(algorithm)
    experience = collect(toy_engine(algorithm)).experience
    learner.learn(experience)
    before = {k: v.clone() for k, v in learner.policy.trainable_parameters().items()}
    moments = [dict(s) for s in learner.optimizer.state.values()]
    broken = attrs.evolve(experience.trajectory, latents=experience.trajectory.latents * torch.inf)
    with pytest.raises(UpdateRefused, match="not applied"):
        learner.learn(attrs.evolve(experience, trajectory=broken))
    assert all(torch.equal(before[k], v) for k, v in learner.policy.trainable_parameters().items())
    for state, old in zip(learner.optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[k], old[k]) for k in old)
    assert learner.optimizer_step == 1


# ---------------------------------------------------------------------------------------------------- parts that do
# not fit


def test_parts_that_do_not_fit_are_refused_before_loading():
    with pytest.raises(ValueError, match="stochastic sampler such as SDE"):
        Algorithm(
            policy=ToySpec(), sampler=ODE(), reward=QuadrantBrightness(), credit=UNIFORM, objective=ClippedSurrogate()
        )
    with pytest.raises(ValueError, match="attention/text_to_image/7"):
        Algorithm(
            policy=ToySpec(),
            sampler=SDE(),
            reward=QuadrantBrightness(),
            credit=product(TextAttention(direction="text_to_image", blocks="7")),
            objective=ClippedSurrogate(),
        )
    algorithm = Algorithm(
        policy=ToySpec(), sampler=SDE(), reward=QuadrantBrightness(), credit=UNIFORM, objective=ClippedSurrogate()
    )
    with pytest.raises(ValueError, match="group of one"):
        algorithm.check_group_size(1)
    with pytest.raises(ValueError, match="hold at least one step"):
        SDE(num_steps=4, window=(3, 3))
    with pytest.raises(ValueError, match="noise"):
        FlowSDE(noise_level=0.0)


def test_sigma_draws_on_the_rollout_grid_are_distinct_and_bounded():
    algorithm = toy_algorithm(DiffusionNFT(sigmas=SigmaDraws(count=3, grid="rollout")), sampler=ODE(num_steps=6))
    toy_learner(algorithm).learn(collect(toy_engine(algorithm)).experience)
    too_many = toy_algorithm(DiffusionNFT(sigmas=SigmaDraws(count=9, grid="rollout")), sampler=ODE(num_steps=6))
    with pytest.raises(ValueError, match="count <= 5"):
        toy_learner(too_many).learn(collect(toy_engine(too_many)).experience)
