"""What an algorithm does with input that makes no sense: it says so, or does what its documentation promises.

A message names the value, the reason and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import attrs
import pytest
import torch

from rlt2i.algorithm import Algorithm
from rlt2i.credit.algebra import Product
from rlt2i.credit.controls import Inverted, Oracle, Shuffled
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.noise_aware import NoiseAware
from rlt2i.credit.random_window import RandomWindow
from rlt2i.credit.relative_l1_chunks import RelativeL1Chunks
from rlt2i.credit.text_attention import TextAttention
from rlt2i.functional.allocation import attention_allocation
from rlt2i.functional.gaussian import log_prob_map
from rlt2i.functional.group_matching import dgpo_loss_map
from rlt2i.functional.matching import nft_loss_map, weighted_matching_loss_map
from rlt2i.functional.surrogate import clipped_surrogate, flow_dppo_surrogate, reinforce
from rlt2i.interfaces import Objective, Reward, RewardBatch, RewardOutput, Sampler
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.reinforce import Reinforce
from rlt2i.recipes import PARTS
from rlt2i.samplers.kernels import CPS, DDIM, DanceSDE, FlowSDE
from rlt2i.samplers.mixed import RandomWindowSDE, SlidingSDE
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from rlt2i.types import Credit, Rewards
from tests.helpers.build import UNIFORM, collect, toy_algorithm, toy_engine, toy_learner
from tests.helpers.credit_contexts import make_context
from tests.helpers.objective_cases import ALL, experience_for, gradient, with_credit
from tests.helpers.toy import QuadrantBrightness, ToySpec

WAY_OUT = re.compile(r"\b(Use|Choose|Change|Name|Give|Pass|Train|use|widen|must say|reshape|mask out|detach)\b")


def refused(make: Callable[[], object], *words: str) -> None:
    """A ValueError whose message has the given words (value and reason) and a way out."""
    with pytest.raises(ValueError, match=WAY_OUT) as caught:
        make()
    for word in words:
        assert word in str(caught.value), caught.value


# ------------------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SDE(num_steps=10, window=(3, 11)), ("(3, 11)", "last <= 10")),
        (lambda: SDE(num_steps=10, window=(4, 4)), ("(4, 4)", "at least one step")),
        (lambda: SDE(num_steps=10, window=(-1, 4)), ("(-1, 4)",)),
        (lambda: SlidingSDE(num_steps=4, last=5), ("last=5", "0 < last <= 4")),
        (lambda: RandomWindowSDE(num_steps=10, low=8, width=3, high=10), ("low=8", "low + width <= high")),
    ],
)
def test_a_window_outside_of_the_trajectory_is_refused_at_construction(make, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_window_wider_than_what_can_be_trained_is_refused():
    context = make_context([0.0, 1.0], group_size=2, stochastic=(0, 1))
    refused(lambda: RandomWindow(width=3).mask(context), "width=3", "only 2 steps")
    refused(lambda: RelativeL1Chunks(num_chunks=3).weight(context), "num_chunks=3", "2 steps")


# ------------------------------------------------------------------------------------------------------------- groups


def test_a_group_of_one_is_refused_before_anything_runs():
    for objective in (ClippedSurrogate(), DiffusionNFT()):
        refused(lambda o=objective: toy_algorithm(o).check_group_size(1), "group_size=1", "no spread")


def test_an_invalid_rollout_leaves_its_groups_statistics():
    # Without the third, the group is 0, 1, 2: mean 1, std sqrt(2/3).
    context = make_context([0.0, 1.0, 50.0, 2.0], group_size=4, valid=[True, True, False, True])
    advantage = GroupRelative().advantage(context).flatten()
    spread = (2 / 3) ** 0.5 + 1e-4
    torch.testing.assert_close(advantage, torch.tensor([-1 / spread, 0.0, 0.0, 1 / spread]))


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("refl", "draft")])
def test_an_invalid_rollout_leaves_the_loss(name: str):
    # What it looks like does not matter; the rollouts that are left keep their place in the mean.
    objective = ALL[name]
    experience = experience_for(objective)
    valid = torch.arange(experience.num_rollouts) != 1
    credit = experience.credit
    judged = attrs.evolve(
        with_credit(experience, advantage=torch.where(valid[:, None, None, None], credit.advantage, 0)),
        rewards=attrs.evolve(experience.rewards, valid=valid),
    )
    latents = experience.trajectory.latents.clone()
    latents[1] = 7.0
    elsewhere = attrs.evolve(judged, trajectory=attrs.evolve(judged.trajectory, latents=latents))
    expected, found = gradient(objective, judged), gradient(objective, elsewhere)
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_all_rewards_equal_teaches_nothing_and_changes_nothing():
    @attrs.frozen(kw_only=True)
    class Indifferent(QuadrantBrightness):
        def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
            output = super().score(batch, want)
            return attrs.evolve(output, scores=torch.full_like(output.scores, 0.1))

    algorithm = toy_algorithm(ClippedSurrogate(), reward=Indifferent())
    before = {k: v.detach().clone() for k, v in algorithm.policy.trainable_parameters().items()}
    metrics = toy_learner(algorithm).learn(collect(toy_engine(algorithm)).experience)
    assert metrics["grad_norm"] == 0
    assert metrics["informative"] == 0
    assert all(torch.equal(v, before[k]) for k, v in algorithm.policy.trainable_parameters().items())


# ----------------------------------------------------------------------------------------------------- rewards and maps


def rewards(**fields: object) -> Rewards:
    good = {"values": torch.tensor([[0.1], [0.2]]), "valid": torch.tensor([True, True])}
    return Rewards(**(good | fields))  # type: ignore[arg-type]


def test_a_nan_reward_must_say_that_it_is_invalid():
    broken = torch.tensor([[0.1], [torch.nan]])
    refused(lambda: rewards(values=broken), "rollout 1", "nan", "poisoning")
    # Marked invalid, it is left out.
    found = GroupRelative().advantage(
        make_context(torch.tensor([0.0, torch.nan, 1.0]), group_size=3, valid=[True, False, True])
    )
    assert torch.isfinite(found).all()
    assert found[1] == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -0.5])
def test_a_map_that_is_no_map_is_refused(value: float):
    maps = torch.ones(2, 4, 4)
    maps[1, 0, 0] = value
    refused(lambda: rewards(maps=maps), "Rewards.maps", "finite and not negative")
    attention = torch.ones(2, 1, 1, 4, 4)
    attention[0, 0, 0, 0, 0] = value
    if value != torch.inf:
        refused(lambda: attention_allocation(attention), "negative values or nan")


def test_credit_that_is_not_finite_is_refused():
    def credit(**fields: torch.Tensor) -> Credit:
        one = torch.ones(2, 1, 1, 1)
        return Credit(**({"advantage": one, "weight": one, "mask": one > 0} | fields), grid=(1, 1))  # type: ignore[arg-type]

    nan, negative = torch.full((2, 1, 1, 1), torch.nan), -torch.ones(2, 1, 1, 1)
    refused(lambda: credit(advantage=nan), "finite", "mask out")
    refused(lambda: credit(weight=nan), "finite", "mask out")
    with pytest.raises(ValueError, match="the sign belongs in the advantage"):
        credit(weight=negative)
    refused(lambda: credit(advantage=torch.ones(2, 1, 1, 1).requires_grad_()), "carries a gradient", "detach")


def test_controls_of_a_weight_without_places_are_refused():
    context = make_context([0.0, 1.0], group_size=2)
    for control in (Shuffled(allocation=NoiseAware()), Inverted(allocation=NoiseAware())):
        refused(lambda c=control: c.weight(context), "NoiseAware", "no map")


# --------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("grid", [(3, 3), (8, 5), (16, 16)])
def test_a_credit_grid_that_does_not_fit_the_latents_is_refused(grid: tuple[int, int]):
    experience = experience_for(ALL["clipped"])
    weight = torch.ones(experience.num_rollouts, 1, *grid)
    refused(lambda: with_credit(experience, weight=weight), str(grid), "(8, 8)", "equal cells")


def test_credit_that_resolves_other_steps_is_refused():
    experience = experience_for(ALL["clipped"])
    with pytest.raises(ValueError, match="credit resolves 5 steps, the trajectory has 6"):
        with_credit(experience, weight=torch.ones(1, 5, 1, 1))


@pytest.mark.parametrize("extra", [(3,), (2, 1, 1, 1), (1, 4, 5)])
def test_credit_broadcasts_into_a_loss_and_never_expands_it(extra: tuple[int, ...]):
    log_ratio, wide = torch.zeros(2, 4, 4, requires_grad=True), torch.ones(extra)
    latents, times = torch.zeros(2, 3, 4, 4), torch.full((2,), 0.5)
    for make in (
        lambda: clipped_surrogate(log_ratio, wide, 1e-4),
        lambda: clipped_surrogate(log_ratio, torch.ones(2, 1, 1), 1e-4, weight=wide),
        lambda: clipped_surrogate(log_ratio, torch.ones(2, 1, 1), torch.ones(extra)),
        lambda: flow_dppo_surrogate(log_ratio, wide, torch.zeros(2, 4, 4), 1e-5),
        lambda: flow_dppo_surrogate(log_ratio, torch.ones(2, 1, 1), wide, 1e-5),
        lambda: reinforce(log_ratio, wide),
        lambda: weighted_matching_loss_map(log_ratio, wide),
        lambda: dgpo_loss_map(log_ratio, wide, torch.ones(2)),
        lambda: nft_loss_map(latents, latents, latents, latents, times, torch.full(extra, 0.5)),
    ):
        with pytest.raises(ValueError, match=r"expand|neither a number"):
            make()


def test_numbers_per_sample_do_not_slip_onto_other_axes():
    # A [B, 1, 1, 1] for another batch, or one number per column, would broadcast without a word.
    latents = torch.zeros(2, 3, 4, 4)
    for std in (torch.ones(3, 1, 1, 1), torch.ones(1, 1, 1, 5), torch.ones(4)):
        with pytest.raises(ValueError, match=r"expand|neither a number"):
            log_prob_map(latents, latents, std)


# ------------------------------------------------------------------------------------------------- what parts must have


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlowSDE(noise_level=0.0), ("noise_level=0.0", "no log-probability")),
        (lambda: FlowSDE(noise_level=float("nan")), ("noise_level=nan", "no log-probability")),
        (lambda: DanceSDE(eta=-0.3), ("eta=-0.3", "no log-probability")),
        (lambda: CPS(noise_level=0.0), ("noise_level=0.0", "no log-probability")),
        (lambda: DDIM(eta=0.0), ("eta=0.0", "no log-probability")),
    ],
)
def test_an_sde_without_noise_is_refused(make, words):
    refused(make, *words)


@pytest.mark.parametrize("kernel", [CPS(), DDIM()], ids=["cps", "ddim"])
@pytest.mark.parametrize("name", ["clipped", "guard", "dppo", "reinforce"])
def test_a_last_step_without_noise_teaches_nothing(name: str, kernel):
    # These kernels end at sigma = 0 with std 0: the ratio is 1 and the step has no gradient, whatever the credit.
    algorithm = toy_algorithm(ALL[name], sampler=SDE(num_steps=3, window=(2, 3), kernel=kernel))
    metrics = toy_learner(algorithm).learn(collect(toy_engine(algorithm), prompts=2, group_size=4).experience)
    assert metrics["grad_norm"] == 0
    assert metrics.get("ratio/abs_minus_one_max", 0.0) == 0


@pytest.mark.parametrize("objective", [ClippedSurrogate(), Reinforce(), ALL["guard"], ALL["dppo"]])
def test_an_objective_on_log_probs_refuses_a_deterministic_sampler(objective: Objective):
    refused(lambda: toy_algorithm(objective, sampler=ODE()), type(objective).__name__, "ODE", "deterministic")


def test_credit_for_noise_refuses_a_deterministic_sampler():
    credit = Product(advantage=GroupRelative(), allocations=(NoiseAware(),))
    refused(lambda: toy_algorithm(DiffusionNFT(), credit=credit, sampler=ODE()), "NoiseAware", "ODE", "deterministic")


@attrs.frozen(kw_only=True)
class ScoresOnly(Reward):
    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        raise AssertionError("never asked")


def with_reward(objective: Objective, reward: Reward, sampler: Sampler, **credit: object) -> Algorithm:
    return Algorithm(
        policy=ToySpec(),
        sampler=sampler,
        reward=reward,
        credit=Product(advantage=GroupRelative(), **credit) if credit else UNIFORM,  # type: ignore[arg-type]
        objective=objective,
    )


def test_credit_from_maps_refuses_a_reward_without_any():
    refused(
        lambda: with_reward(ClippedSurrogate(), ScoresOnly(), SDE(), allocations=(Oracle(),)),
        "Oracle", "maps", "ScoresOnly", "only scores",
    )  # fmt: skip


def differentiating() -> list[str]:
    from benchmarks.compatibility_matrix import part

    return [n for n in PARTS["Objective"] if "gradient" in part("Objective", n).needs.reward]


def test_an_objective_on_the_rewards_gradient_refuses_a_reward_without_any():
    from benchmarks.compatibility_matrix import part

    assert differentiating()
    for name in differentiating():
        refused(
            lambda n=name: with_reward(part("Objective", n), ScoresOnly(), ODE()), name, "gradient", "ScoresOnly"
        )  # fmt: skip


def test_captures_that_nobody_records_are_refused():
    credit = Product(advantage=GroupRelative(), allocations=(TextAttention(blocks="3"),))
    refused(lambda: toy_algorithm(ClippedSurrogate(), credit=credit), "TextAttention", "attention", "ToySpec")


@pytest.mark.parametrize("decay", [-0.5, 1.5, 3, float("nan")])
def test_an_old_policy_that_keeps_more_than_all_of_itself_is_refused(decay: float):
    refused(lambda: DiffusionNFT(decay=decay), f"decay={decay}", "share")
    assert DiffusionNFT(decay=0.9).old_decay(500) == 0.9
    assert DiffusionNFT(decay=2).old_decay(74) == 0.0


def test_a_parameter_set_that_nobody_keeps_is_named():
    algorithm = toy_algorithm(ClippedSurrogate())
    learner = toy_learner(algorithm)
    with pytest.raises((ValueError, KeyError), match="old"), learner.sets.use("old"):
        pass


def test_a_second_update_without_a_ratio_is_refused():
    algorithm = toy_algorithm(Reinforce())
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    refused(
        lambda: toy_learner(algorithm, optimizer_steps_per_iteration=2).learn(experience),
        "Reinforce",
        "optimizer_steps_per_iteration=1",
    )
