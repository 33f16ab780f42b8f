"""Laws that every registered part obeys.

The tests go through the table of parts, so a new part is held to them without another line here. A law that a part
cannot obey names the part and says why.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.compatibility_matrix import Judged, part, samplers
from rlt2i.algorithm import Algorithm
from rlt2i.captures import PREFERENCE
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.functional.schedules import sd3_sigmas
from rlt2i.interfaces import CreditAssigner, CreditContext, Needs, Objective, RewardGradient, RewardOutput, Sampler
from rlt2i.objectives import draws
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.reverse import denoising_step
from rlt2i.recipes import PARTS
from rlt2i.samplers.ode import ODE
from rlt2i.types import CAUSALITIES, Conditioning, Credit, Experience, TransitionKernel
from tests.helpers.build import UNIFORM, collect, gradients, toy_engine, toy_learner
from tests.helpers.credit_contexts import permuted
from tests.helpers.toy import SIDE, ToyPolicy, ToySpec

few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# ------------------------------------------------------------------------------------- the setting a part works in


def fit(credit: CreditAssigner, objective: Objective) -> Algorithm:
    """The toy algorithm with the first sampler that suits credit and objective, noisy ones first."""
    table = samplers()
    first = [name for name in ("SDE(FlowSDE)", "ODE") if name in table]
    refusals = {}
    for name in [*first, *(name for name in table if name not in first)]:
        try:
            return compose(credit, objective, table[name])
        except ValueError as refused:
            refusals[name] = str(refused)
    raise AssertionError(f"no sampler suits {credit} and {objective}: {refusals}")


def compose(credit: CreditAssigner, objective: Objective, sampler: Sampler) -> Algorithm:
    return Algorithm(policy=ToySpec(), sampler=sampler, reward=Judged(), credit=credit, objective=objective).load()


def group_size(algorithm: Algorithm) -> int:
    """4, or what the parts ask for."""
    for size in (4, *range(2, 65)):
        try:
            algorithm.check_group_size(size)
        except ValueError:
            continue
        return size
    raise AssertionError(f"{algorithm} takes no group size up to 64")


@attrs.frozen(kw_only=True, eq=False)
class Watched(CreditAssigner):
    """Another credit, and the contexts that it was asked in."""

    credit: CreditAssigner
    seen: list[CreditContext]

    @property
    def needs(self) -> Needs:
        needs = self.credit.needs
        return attrs.evolve(needs, captures=needs.captures - {PREFERENCE})

    def scored_steps(self, num_steps: int) -> tuple[int, ...]:
        return self.credit.scored_steps(num_steps)

    def assign(self, context: CreditContext) -> Credit:
        count, steps = context.trajectory.num_rollouts, context.trajectory.num_steps
        verdict = 1.0 - 2.0 * (torch.arange(count) % 2)  # what a file of pairs would say
        captures = {**context.trajectory.captures, PREFERENCE: verdict[:, None].expand(-1, steps)}
        trajectory = attrs.evolve(context.trajectory, captures=captures)
        self.seen.append(attrs.evolve(context, trajectory=trajectory))
        return UNIFORM.assign(context)


def context_for(credit: CreditAssigner) -> CreditContext:
    """A context with two groups of rollouts of the toy policy, in which the given credit has all it needs."""
    watched = Watched(credit=credit, seen=[])
    algorithm = fit(watched, DiffusionNFT())
    size = 2 if PREFERENCE in credit.needs.captures else group_size(algorithm)
    collect(toy_engine(algorithm), prompts=2, group_size=size)
    return watched.seen[0]


@cache
def of(kind: str, name: str) -> tuple[Any, CreditContext]:
    """A registered advantage, allocation or mask, and a context for it."""
    built = part(kind, name)
    credit = {
        "Advantage": lambda: Product(advantage=built),
        "Allocation": lambda: Product(advantage=GroupRelative(), allocations=(built,)),
        "Mask": lambda: Product(advantage=GroupRelative(), masks=(built,)),
    }[kind]()
    return built, context_for(credit)


def with_rewards(context: CreditContext, final: Tensor, valid: Tensor) -> CreditContext:
    """The same rollouts judged otherwise: finished images, clean predictions, terms and completions alike."""
    rewards = context.rewards

    def score(latents: Tensor, rollouts: Tensor) -> RewardOutput:
        return RewardOutput(scores=final[rollouts], valid=valid[rollouts])

    values = final[:, None].expand(-1, rewards.values.shape[1]).contiguous()
    changed = attrs.evolve(rewards, values=values, valid=valid, terms=dict.fromkeys(rewards.terms, final))
    return attrs.evolve(context, rewards=changed, score=score, complete=lambda latents, step, rollouts: latents)


# -------------------------------------------------------------------------------------------------------- advantages

LABELS = {
    "BestOfGroup": "says whom to imitate, and blames nobody",
    "RewardWeights": "is the raw reward, without a baseline",
}
NOT_FROM_REWARDS = {"RecordedPreference": "somebody preferred one image, whatever the reward says"}


def compared(credit: Credit, size: int) -> Tensor:
    """[groups, steps x places] mean advantage over what counts."""
    kept = credit.mask.expand_as(credit.advantage)
    total = torch.where(kept, credit.advantage, 0).unflatten(0, (-1, size)).sum(dim=1)
    return (total / kept.unflatten(0, (-1, size)).sum(dim=1).clamp(min=1)).flatten(1)


@pytest.mark.parametrize("name", PARTS["Advantage"])
def test_advantages_are_finite_constants_with_mean_zero(name: str):
    advantage, context = of("Advantage", name)
    size, count = context.group_size, context.trajectory.num_rollouts

    @few
    @given(
        scores=st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 3.0]), min_size=count, max_size=count),
        valid=st.lists(st.booleans(), min_size=count, max_size=count),
    )
    def law(scores: list[float], valid: list[bool]) -> None:
        judged = with_rewards(context, torch.tensor(scores), torch.tensor(valid))
        found = advantage.advantage(judged)
        assert found.shape[0] == count
        assert found.shape[1] in (1, context.trajectory.num_steps)
        assert found.shape[2:] in ((1, 1), context.token_grid)
        assert not found.requires_grad
        assert torch.isfinite(found).all()
        credit = Product(advantage=advantage).assign(judged)
        alone = credit.mask.expand_as(credit.advantage) if "edges" in advantage.needs.captures else torch.tensor(False)
        if not alone.any():  # a step that several rollouts share is judged by those of them that are valid
            assert (found[~torch.tensor(valid)] == 0).all()
        if name not in LABELS:
            means = compared(credit, size)
            torch.testing.assert_close(means, torch.zeros_like(means), atol=1e-4, rtol=0)

    law()


@pytest.mark.parametrize("name", [n for n in PARTS["Advantage"] if n not in LABELS | NOT_FROM_REWARDS])
def test_a_tied_group_gets_exactly_nothing(name: str):
    advantage, context = of("Advantage", name)
    size, count = context.group_size, context.trajectory.num_rollouts
    final = torch.cat([torch.full((size,), 0.7), torch.arange(count - size).float()])
    found = advantage.advantage(with_rewards(context, final, torch.ones(count, dtype=torch.bool)))
    assert (found[:size] == 0).all()


@pytest.mark.parametrize("name", PARTS["Advantage"])
def test_advantages_permute_with_rollouts(name: str):
    advantage, context = of("Advantage", name)
    order = shuffled_order(context)
    expected = advantage.advantage(fresh(context))[order]
    torch.testing.assert_close(advantage.advantage(permuted(context, order)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PARTS["Advantage"])
def test_advantages_keep_to_their_bound(name: str):
    free, context = of("Advantage", name)
    if "clip" not in attrs.fields_dict(type(free)):
        pytest.skip(f"{name} has no bound")
    spread = attrs.evolve(free, clip=100.0).advantage(fresh(context)).abs().max()
    bound = 0.9 * float(spread)
    found = attrs.evolve(free, clip=bound).advantage(fresh(context))
    assert spread > bound > 0
    assert float(found.abs().max()) == pytest.approx(bound)


def shuffled_order(context: CreditContext) -> Tensor:
    """Another order of the rollouts in which groups stay together."""
    size, count = context.group_size, context.trajectory.num_rollouts
    draw = torch.Generator().manual_seed(3)
    groups = [start + torch.randperm(size, generator=draw) for start in range(0, count, size)]
    return torch.cat(groups[::-1])


def fresh(context: CreditContext) -> CreditContext:
    return attrs.evolve(context, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------- allocations


@pytest.mark.parametrize("name", PARTS["Allocation"])
def test_weights_are_finite_constants_with_mean_one(name: str):
    allocation, context = of("Allocation", name)
    with torch.enable_grad():
        weight = allocation.weight(fresh(context))
    assert allocation.causality in CAUSALITIES
    assert not weight.requires_grad
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()
    stochastic = context.trajectory.stochastic
    if weight.shape[2:] == (1, 1):  # over the steps that are trained
        mean = weight.expand(-1, len(stochastic), -1, -1)[:, stochastic].mean(dim=1)
    else:
        mean = weight.mean(dim=(2, 3))
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=1e-4, atol=1e-5)
    assert torch.equal(weight, allocation.weight(fresh(context)))


@pytest.mark.parametrize("name", PARTS["Allocation"])
def test_weights_permute_with_rollouts(name: str):
    allocation, context = of("Allocation", name)
    order = shuffled_order(context)
    weight = allocation.weight(fresh(context))
    expected = weight if len(weight) == 1 else weight[order]
    torch.testing.assert_close(allocation.weight(permuted(context, order)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PARTS["Allocation"])
def test_credit_is_detached_even_where_gradients_are_on(name: str):
    allocation, context = of("Allocation", name)
    with torch.enable_grad():
        credit = Product(advantage=GroupRelative(), allocations=(allocation,)).assign(fresh(context))
    assert not any(field.requires_grad for field in (credit.advantage, credit.weight, credit.mask))
    assert credit.causality == allocation.causality


def alike_everywhere(context: CreditContext) -> CreditContext:
    """The same rollouts in a world where no place differs from another."""
    trajectory, rewards = context.trajectory, context.rewards
    level = lambda field: field.mean(dim=(-2, -1), keepdim=True).expand_as(field)
    flat = attrs.evolve(
        trajectory,
        latents=level(trajectory.latents),
        captures={k: level(v) if v.ndim > 3 else v for k, v in trajectory.captures.items()},
    )
    count = trajectory.num_rollouts
    same = attrs.evolve(
        rewards, maps=None if rewards.maps is None else torch.ones_like(rewards.maps), regions=((),) * count
    )
    return attrs.evolve(
        context,
        trajectory=flat,
        rewards=same,
        images=torch.full_like(context.images, 128),
        score=lambda latents, rows: RewardOutput(
            scores=torch.full((len(rows),), 0.5), valid=torch.ones(len(rows), dtype=torch.bool)
        ),
        reward_gradient=lambda latents, rows: RewardGradient(
            scores=torch.full((len(rows),), 0.5), gradient=torch.ones_like(latents)
        ),
        generator=torch.Generator().manual_seed(0),
    )


SEES_PLACES = {"FeatureSaliency": "has a transformer that tells the positions of equal patches apart"}


@pytest.mark.parametrize("name", [n for n in PARTS["Allocation"] if n not in SEES_PLACES])
def test_where_no_place_differs_the_map_is_uniform(name: str):
    allocation, context = of("Allocation", name)
    weight = allocation.weight(alike_everywhere(context))
    if weight.shape[2:] != (1, 1):  # only maps over space have something to say here
        torch.testing.assert_close(weight, torch.ones_like(weight))


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", PARTS["Mask"])
def test_masks_keep_a_step_that_can_be_trained(name: str):
    mask, context = of("Mask", name)
    for iteration in (0, 1, 7, 1000):
        kept = mask.mask(attrs.evolve(fresh(context), iteration=iteration))
        assert kept.dtype is torch.bool
        kept = kept.expand(context.trajectory.num_rollouts, context.trajectory.num_steps, -1, -1)
        assert kept.flatten(1).any(dim=1).all()
        assert not kept[:, ~context.trajectory.stochastic].any()


# -------------------------------------------------------------------------------------------------------- objectives

WITHOUT_ADVANTAGE = "teaches by the gradient of the reward itself"
FOLLOWS_REWARD = {
    "DiffusionOPSD": "takes its direction from the reward's gradient, and from the advantage how far",
}
NOT_LINEAR = {
    "DiffusionOPSD": "goes the way of the reward's gradient, whatever the advantage, until the policy has moved",
    "CRD": "regresses on labels: the centred label stays where the policy has not moved",
    "DGPO": "has the credit inside the sigmoid that weighs the group",
    "DiffusionDPO": "takes the order of a pair only",
    "OnlineDPO": "takes the order of a pair only",
}


def objective_of(name: str) -> Objective:
    return part("Objective", name)


@cache
def experience_for(objective: Objective) -> Experience:
    algorithm = fit(UNIFORM, objective)
    return collect(toy_engine(algorithm), prompts=2, group_size=group_size(algorithm)).experience


def gradient(objective: Objective, experience: Experience) -> dict[str, Tensor]:
    """Of the first update of a fresh policy."""
    return gradients(toy_learner(fit(UNIFORM, objective)), experience)


def with_credit(experience: Experience, **fields: Tensor) -> Experience:
    credit = experience.credit
    shapes = [f.shape[2:] for f in (*fields.values(), credit.advantage, credit.weight, credit.mask)]
    height, width = torch.broadcast_shapes(*shapes)
    return attrs.evolve(experience, credit=attrs.evolve(credit, **fields, grid=(height, width)))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], *, exactly: bool = True) -> None:
    for name, value in expected.items():
        if exactly:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def local_velocity(policy: ToyPolicy, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
    """The toy policy without its convolution: places do not see each other."""
    return latents + policy.image + 0 * policy.network(latents).sum()


@pytest.mark.parametrize("name", [n for n in PARTS["Objective"] if n not in FOLLOWS_REWARD])
def test_no_advantage_no_gradient(name: str):
    objective = objective_of(name)
    if not objective.uses_advantage:
        pytest.skip(f"{name} {WITHOUT_ADVANTAGE}")
    experience = experience_for(objective)
    algorithm = fit(UNIFORM, objective)
    learner = toy_learner(algorithm)
    before = {k: v.detach().clone() for k, v in algorithm.policy.trainable_parameters().items()}
    tied = with_credit(experience, advantage=torch.zeros_like(experience.credit.advantage))
    metrics = learner.learn(tied)
    assert metrics["grad_norm"] == 0
    assert_equal(dict(algorithm.policy.trainable_parameters()), before)


@pytest.mark.parametrize("name", PARTS["Objective"])
def test_a_constant_map_is_no_map(name: str):
    objective = objective_of(name)
    experience = experience_for(objective)
    ones = torch.ones(experience.num_rollouts, experience.trajectory.num_steps, SIDE // 2, SIDE // 2)
    found = gradient(objective, with_credit(experience, weight=ones))
    assert_equal(found, gradient(objective, experience))
    assert found["image"].abs().sum() > 0


@pytest.mark.parametrize("name", [n for n in PARTS["Objective"] if n not in FOLLOWS_REWARD])
def test_permuting_places_permutes_the_gradient(name: str, monkeypatch: pytest.MonkeyPatch):
    objective = objective_of(name)
    if not objective.uses_advantage:
        pytest.skip(f"{name} {WITHOUT_ADVANTAGE}, which has places of its own")
    experience = experience_for(objective)
    draw = torch.Generator().manual_seed(5)
    weight = torch.rand(experience.num_rollouts, experience.trajectory.num_steps, SIDE, SIDE, generator=draw) + 0.5
    mapped = with_credit(experience, weight=weight / weight.mean(dim=(2, 3), keepdim=True))
    order = torch.randperm(SIDE * SIDE, generator=draw)

    def moved(field: Tensor) -> Tensor:
        return field.flatten(-2)[..., order].unflatten(-1, (SIDE, SIDE))

    monkeypatch.setattr("tests.helpers.toy.ToyPolicy.velocity", local_velocity)
    expected = gradient(objective, mapped)["image"]
    drawn = draws.standard_normal
    monkeypatch.setattr(draws, "standard_normal", lambda *args: moved(drawn(*args)))
    trajectory = mapped.trajectory
    elsewhere = attrs.evolve(
        mapped,
        trajectory=attrs.evolve(
            trajectory, latents=moved(trajectory.latents), log_probs=moved(trajectory.log_probs.contiguous())
        ),
        credit=attrs.evolve(mapped.credit, weight=moved(mapped.credit.weight)),
    )
    found = gradient(objective, elsewhere)["image"]
    torch.testing.assert_close(found, moved(expected), rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", PARTS["Objective"])
def test_masked_steps_do_not_change_the_others(name: str):
    objective = objective_of(name)
    experience = experience_for(objective)
    steps = experience.trajectory.num_steps
    kept = experience.credit.mask & (torch.arange(steps) % 2 == 0).view(1, steps, 1, 1)
    advantage = experience.credit.advantage.expand(-1, steps, 1, 1).clone()
    changed = torch.where(kept, advantage, -3 * advantage)
    found = gradient(objective, with_credit(experience, advantage=changed, mask=kept))
    assert_equal(found, gradient(objective, with_credit(experience, advantage=advantage, mask=kept)))


@pytest.mark.parametrize("name", [n for n in PARTS["Objective"] if n not in NOT_LINEAR])
def test_scaling_credit_scales_the_on_policy_gradient(name: str):
    objective = objective_of(name)
    if not objective.uses_advantage:
        pytest.skip(f"{name} {WITHOUT_ADVANTAGE}")
    experience = experience_for(objective)
    whole = gradient(objective, experience)
    half = gradient(objective, with_credit(experience, advantage=experience.credit.advantage / 2))
    assert_equal({k: 2 * v for k, v in half.items()}, whole, exactly=False)


@pytest.mark.parametrize("name", PARTS["Objective"])
def test_the_first_update_is_on_policy(name: str):
    objective = objective_of(name)
    metrics = toy_learner(fit(UNIFORM, objective)).learn(experience_for(objective))
    assert metrics.get("ratio/abs_minus_one_max", 0.0) == 0.0
    assert metrics.get("clip/high", 0.0) == metrics.get("clip/low", 0.0) == 0.0


@pytest.mark.parametrize("name", PARTS["Objective"])
def test_an_update_is_a_function_of_its_experience(name: str):
    objective = objective_of(name)
    experience = experience_for(objective)
    assert_equal(gradient(objective, experience), gradient(objective, experience))


# ---------------------------------------------------------------------------------------------------------- samplers


def stochastic() -> dict[str, Sampler]:
    """Every sampler with noise, under every kernel."""
    return {name: sampler for name, sampler in samplers().items() if sampler.stochastic_steps(0)}


def test_every_sampler_and_kernel_takes_part():
    named = " ".join(samplers())
    for kind in ("Sampler", "TransitionKernel"):
        for name in PARTS[kind]:
            assert name in named


def test_replayed_log_probs_are_the_recorded_ones():
    for name, sampler in stochastic().items():
        algorithm = compose(UNIFORM, ClippedSurrogate(), sampler)
        experience = collect(toy_engine(algorithm), prompts=2, group_size=group_size(algorithm)).experience
        trajectory = experience.trajectory
        for step in sampler.stochastic_steps(0):
            rows = trajectory.noisy[:, step].nonzero()[:, 0]
            pairs = experience.step_batch(rows, torch.full_like(rows, step))
            with torch.no_grad():
                transition = denoising_step(algorithm.policy, trajectory, pairs).transition
            replayed = trajectory.kernel.log_prob_map(pairs.next_latents, transition)
            torch.testing.assert_close(
                replayed, trajectory.log_probs[rows, step], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_first_ratio_is_exactly_one_for_every_sampler():
    for name, sampler in stochastic().items():
        algorithm = compose(UNIFORM, ClippedSurrogate(), sampler)
        experience = collect(toy_engine(algorithm), prompts=2, group_size=group_size(algorithm)).experience
        metrics = toy_learner(algorithm).learn(experience)
        assert metrics["ratio/abs_minus_one_max"] == 0.0, name
        assert metrics["grad_norm"] > 0, name


# ----------------------------------------------------------------------------------------------------------- kernels

# Noise of x' over the sigma' that the network is told, after each of the first nine of ten steps of the SD3 schedule,
# where the data are one point, so that the velocity is known: what Flow-SDE's images carry as residual noise.
RESIDUAL_NOISE = {
    "FlowSDE": (1.04, 1.08, 1.08, 1.08, 1.09, 1.10, 1.13, 1.28, 27.9),
    "DanceSDE": (1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.01, 1.05, 17.9),
    "CPS": (1.00,) * 9,
    "DDIM": (1.00,) * 9,
    "Precise": (1.00,) * 9,
}
NOT_CONSISTENT = {
    "CPS": "draws a fixed share of the noise anew however short the step: that keeps the noise, not the data"
}


def spread_along(kernel: TransitionKernel, sigmas: Tensor, *, data: float) -> list[float]:
    """Standard deviation of the states after each step, for data N(0, data^2) and their exact velocity."""
    variance, found = torch.ones(1, 1, 1, 1, dtype=torch.float64), []
    for now, then in pairwise(sigmas):
        one = torch.ones_like(variance)
        v = (now - data**2 * (1 - now)) / (data**2 * (1 - now) ** 2 + now**2) * one  # linear in the state
        step = kernel.transition(one, v, now.expand(1), then.expand(1), sigma_max=float(sigmas[1]))
        variance = step.mean**2 * variance + step.std**2
        found.append(float(variance.sqrt()))
    return found


@pytest.mark.parametrize("name", PARTS["TransitionKernel"])
def test_residual_noise_of_ten_steps(name: str):
    sigmas = sd3_sigmas(10).double()
    found = spread_along(part("TransitionKernel", name), sigmas, data=0.0)
    ratios = [spread / float(sigma) for spread, sigma in zip(found[:-1], sigmas[1:-1], strict=True)]
    for ratio, stated in zip(ratios, RESIDUAL_NOISE[name], strict=True):
        assert ratio == pytest.approx(stated, abs=0.006 if stated < 2 else 0.05)


@pytest.mark.parametrize("name", [n for n in PARTS["TransitionKernel"] if n not in NOT_CONSISTENT])
def test_marginals_are_kept_to_first_order(name: str):
    # From sigma .8 to .4 in ever shorter steps: the error of the spread halves with the step.
    kernel, data = part("TransitionKernel", name), 0.5

    def error(steps: int) -> float:
        sigmas = torch.cat([torch.ones(1), torch.linspace(0.8, 0.4, steps + 1)]).double()
        start = torch.sqrt(data**2 * 0.2**2 + torch.tensor(0.8).double() ** 2)
        variance = start.view(1, 1, 1, 1) ** 2
        for now, then in pairwise(sigmas[1:]):
            one = torch.ones_like(variance)
            v = (now - data**2 * (1 - now)) / (data**2 * (1 - now) ** 2 + now**2) * one
            step = kernel.transition(one, v, now.expand(1), then.expand(1), sigma_max=float(sigmas[1]))
            variance = step.mean**2 * variance + step.std**2
        return abs(float(variance.sqrt()) - (data**2 * 0.6**2 + 0.4**2) ** 0.5)

    coarse, fine = error(40), error(80)
    assert coarse < 0.02
    assert fine < 0.55 * coarse


def test_the_ode_of_a_group_is_one_path():
    algorithm = compose(UNIFORM, DiffusionNFT(), ODE(num_steps=4))
    trajectory = collect(toy_engine(algorithm, share_initial_noise=True), prompts=1, group_size=4).experience.trajectory
    assert (trajectory.latents == trajectory.latents[:1]).all()
