"""ReFL and DRaFT: chain rules that can be redone on paper, autograd through the same steps, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from rlt2i.algorithm import Algorithm
from rlt2i.config.references import parse_yaml
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.residual_contrast import ResidualContrast
from rlt2i.functional.matching import noised
from rlt2i.functional.reward_backprop import random_depth
from rlt2i.functional.transitions import clean_prediction, euler
from rlt2i.interfaces import Objective, Policy, Reward, RewardBatch, RewardOutput
from rlt2i.objectives.draft import DRaFT
from rlt2i.objectives.draws import shared_noise
from rlt2i.objectives.penalty import VelocityPenalty
from rlt2i.objectives.refl import ReFL
from rlt2i.recipes import recipe_from_mapping
from rlt2i.rewards.gradient import reward_gradient
from rlt2i.rewards.validity import Guarded
from rlt2i.runs.metrics import read_metrics
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from rlt2i.seeds import uniform
from rlt2i.training.start import train
from rlt2i.types import Experience, Prompts
from tests.helpers.build import UNIFORM, collect, gradients, toy_algorithm, toy_engine, toy_learner
from tests.helpers.objective_cases import assert_same, gradient, with_credit
from tests.helpers.toy import SIDE, QuadrantBrightness, ToyPolicy
from tests.recipes.test_recipes import TOY

MAP = torch.linspace(-1, 1, 3 * SIDE * SIDE).view(3, SIDE, SIDE)


class Linear(ToyPolicy):
    """v = a x + b, and latents are images: every chain rule fits on a line."""

    def __init__(self) -> None:
        self.slope = nn.Parameter(torch.tensor(0.5))
        self.image = nn.Parameter(torch.zeros(1, 3, SIDE, SIDE))

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: object) -> Tensor:
        return self.slope * latents + self.image

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {"slope": self.slope, "image": self.image}

    def export(self, folder: Path) -> None:
        raise NotImplementedError


@attrs.frozen(kw_only=True)
class Mapped(Reward):
    """sum of MAP x image."""

    offers = frozenset({"gradient"})

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return (images * MAP).sum(dim=(1, 2, 3))

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        scores = self.score_tensor(batch.images.float() / 255, batch.prompts, batch.metadata)
        return RewardOutput(scores=scores, valid=torch.ones(len(scores), dtype=torch.bool))


def linear(objective: Objective, *, num_steps: int = 4, group_size: int = 2) -> tuple[Algorithm, Experience]:
    algorithm = Algorithm(
        policy=Linear(), sampler=ODE(num_steps=num_steps), reward=Mapped(), credit=UNIFORM, objective=objective
    )
    return algorithm, collect(toy_engine(algorithm), prompts=2, group_size=group_size).experience


def linear_gradient(objective: Objective, experience: Experience | None = None) -> tuple[Experience, dict[str, Tensor]]:
    algorithm, made = linear(objective)
    experience = experience or made
    return experience, gradients(toy_learner(algorithm), experience)


# ---------------------------------------------------------------------------------------------------------- by hand


def test_draft_of_one_step_by_hand():
    # x_0 = x - (a x + b) / 4 from sigma = 1/4, so dr/db = -MAP / 4 and dr/da = -<MAP, x> / 4; the loss is -r.
    experience, found = linear_gradient(DRaFT())
    torch.testing.assert_close(found["image"][0], MAP / 4)
    last = experience.trajectory.latents[:, 3]
    torch.testing.assert_close(found["slope"], (MAP * last).sum(dim=(1, 2, 3)).mean() / 4)


@pytest.mark.parametrize(("detach_input", "factor"), [(False, 1 + (1 - 0.5 / 4)), (True, 2.0)])
def test_draft_of_two_steps_by_hand(detach_input: bool, factor: float):
    # Each step adds -b / 4; the first one also passes through the second, x' (1 - a / 4), unless its input is detached.
    _, found = linear_gradient(DRaFT(steps=2, detach_input=detach_input))
    torch.testing.assert_close(found["image"][0], factor * MAP / 4)


def test_draft_lv_by_hand():
    experience, found = linear_gradient(DRaFT(renoised=2))
    torch.testing.assert_close(found["image"][0], MAP / 4)
    algorithm, _ = linear(DRaFT(renoised=2))
    context = toy_learner(algorithm)._context(4, 2, on_policy=True)
    states = [experience.trajectory.latents[:, 3]]
    for copy in (1, 2):
        number = torch.full((4,), copy)
        noise = shared_noise(context, experience.keys, number, (3, SIDE, SIDE), torch.device("cpu"))
        states.append(noised(experience.trajectory.clean_latents, noise, 0.25))
    assert not torch.allclose(states[1], states[2])
    by_hand = (MAP * torch.stack(states)).sum(dim=(2, 3, 4)).mean() / 4
    torch.testing.assert_close(found["slope"], by_hand)


def test_refl_by_hand():
    # One step of the window each: x_0 = x - sigma (a x + b), so dr/db = -sigma MAP, times the scale.
    objective = ReFL(window=(1, 2), margin=1e6, grad_scale=0.1)
    experience, found = linear_gradient(objective)
    torch.testing.assert_close(found["image"][0], 0.1 * 0.75 * MAP)
    state = experience.trajectory.latents[:, 1]
    torch.testing.assert_close(found["slope"], 0.1 * 0.75 * (MAP * state).sum(dim=(1, 2, 3)).mean())


def test_refl_above_its_margin_teaches_nothing():
    algorithm, experience = linear(ReFL(margin=-1e6))
    metrics = toy_learner(algorithm).learn(experience)
    assert metrics["backprop/above_margin"] == 1.0
    assert metrics["grad_norm"] == metrics["loss/total"] == 0.0
    # With the margin between the rewards, only those below it count.
    trajectory = experience.trajectory
    velocity = algorithm.policy.velocity(trajectory.latents[:, 3], None, None)  # type: ignore[union-attr, arg-type]
    rewards = (MAP * clean_prediction(trajectory.latents[:, 3], velocity.detach(), 0.25)).sum(dim=(1, 2, 3))
    margin = float(rewards.sort().values[1:3].mean())
    algorithm, _ = linear(ReFL(margin=margin, grad_scale=1.0, window=(3, 4)))
    learner = toy_learner(algorithm)
    torch.testing.assert_close(gradients(learner, experience)["image"][0], 2 / 4 * MAP / 4)
    assert learner.learn(experience)["backprop/above_margin"] == 0.5


def test_refl_draws_every_step_of_the_last_quarter_and_no_other():
    objective = ReFL()
    algorithm = toy_algorithm(objective, sampler=ODE(num_steps=12))
    experience = collect(toy_engine(algorithm), prompts=2, group_size=16).experience
    context = toy_learner(algorithm)._context(32, 2, on_policy=True)
    chosen = objective._draw(experience, context)
    assert chosen.sum(dim=1).tolist() == [1] * 32
    assert chosen.any(dim=0).nonzero().flatten().tolist() == [9, 10, 11]
    # A masked step is not drawn; without any step of the window it is the last one, and without any step none.
    mask = torch.ones(32, 12, 1, 1, dtype=torch.bool)
    mask[:, 9:11] = False
    mask[0] = False
    mask[1, 6:] = False
    chosen = objective._draw(with_credit(experience, mask=mask), context)
    assert chosen[2:, 11].all()
    assert not chosen[0].any()
    assert chosen[1].nonzero().flatten().tolist() == [5]


# -------------------------------------------------------------------------------------------- against plain autograd


def by_autograd(experience: Experience, policy: Policy, steps: int) -> dict[str, Tensor]:
    """Gradient of minus the mean reward through the last steps of the sampler, in one graph."""
    trajectory = experience.trajectory
    first = trajectory.num_steps - steps
    latents = trajectory.latents[:, first]
    for step in range(first, trajectory.num_steps):
        sigma, sigma_next = (level.expand(len(latents)) for level in trajectory.sigmas[step : step + 2])
        velocity = policy.velocity(latents, sigma, trajectory.conditioning)
        latents = euler(latents, velocity, sigma, sigma_next).mean
    loss = -QuadrantBrightness().score_tensor(policy.decode(latents), (), ()).mean()
    parameters = policy.trainable_parameters()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("sequences", [1000, 5])
def test_draft_is_autograd_through_the_last_steps(steps: int, sequences: int):
    objective = DRaFT(steps=steps)
    algorithm = toy_algorithm(objective, sampler=SDE(num_steps=6, window=(0, 3)))
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    found = gradients(toy_learner(algorithm, micro_batch_size=sequences), experience)
    assert_same(found, by_autograd(experience, algorithm.policy, steps))  # type: ignore[arg-type]


def test_draft_agrees_with_finite_differences():
    objective = DRaFT(steps=3)
    algorithm = toy_algorithm(objective, sampler=ODE(num_steps=6))
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    learner = toy_learner(algorithm)
    slope = gradients(learner, experience)["image"][0, 1, 2, 3]

    def loss(change: float) -> float:
        with torch.no_grad():
            algorithm.policy.image[0, 1, 2, 3] += change  # type: ignore[union-attr]
        context = learner._context(8, 2, on_policy=True)
        value = sum(
            float(part.value.detach()) for part in objective.losses(learner.policy, experience, context=context)
        )
        with torch.no_grad():
            algorithm.policy.image[0, 1, 2, 3] -= change  # type: ignore[union-attr]
        return value

    assert (loss(0.1) - loss(-0.1)) / 0.2 == pytest.approx(float(slope), rel=2e-2)


def test_the_steps_taken_again_end_where_the_rollout_did():
    objective = DRaFT(steps=4)
    algorithm = toy_algorithm(objective, sampler=ODE(num_steps=6))
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    context = toy_learner(algorithm)._context(8, 2, on_policy=True)
    rows = torch.arange(8)
    learning = torch.arange(6).expand(8, -1) >= 2
    ended, _ = objective._finish(algorithm.policy, experience, rows, 0 * rows, learning, context)  # type: ignore[arg-type]
    torch.testing.assert_close(ended.detach(), experience.trajectory.clean_latents)


def test_refl_at_the_last_step_is_draft_of_one_step():
    refl = ReFL(window=(5, 6), margin=100.0, grad_scale=1.0)
    experience = collect(toy_engine(toy_algorithm(refl, sampler=ODE(num_steps=6))), prompts=2, group_size=4).experience
    assert_same(gradient(refl, experience), gradient(DRaFT(), experience))


def test_random_truncation_is_draft_of_the_drawn_depth():
    objective = DRaFT(steps=5, truncation="random")
    algorithm = toy_algorithm(objective, sampler=ODE(num_steps=6))
    experience = collect(toy_engine(algorithm), prompts=3, group_size=4).experience
    context = toy_learner(algorithm)._context(1, 1, on_policy=True)
    depths = random_depth(uniform(context.seeds("draft", experience.keys), (), torch.device("cpu")), 5)
    assert len(depths.unique()) > 2
    for row in range(4):
        alone = experience.take(torch.tensor([row]))
        assert_same(gradient(objective, alone), gradient(DRaFT(steps=int(depths[row])), alone))


# ---------------------------------------------------------------------------------------------------------- credit


@pytest.mark.parametrize("objective", [DRaFT(), ReFL(window=(3, 4), margin=1e6, grad_scale=1.0)], ids=["draft", "refl"])
def test_weight_and_mask_apply_place_by_place(objective: Objective):
    experience, plain = linear_gradient(objective)
    weight = torch.linspace(0.5, 1.5, 64).view(1, 1, 8, 8)
    _, weighted = linear_gradient(objective, with_credit(experience, weight=weight))
    torch.testing.assert_close(weighted["image"], weight * plain["image"])
    # A constant map, resolved in every axis, is no map.
    _, constant = linear_gradient(objective, with_credit(experience, weight=torch.ones(4, 4, 8, 8)))
    assert_same(constant, plain, exactly=True)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    _, masked = linear_gradient(objective, with_credit(experience, mask=mask))
    assert (masked["image"][..., 4:] == 0).all()
    assert torch.equal(masked["image"][..., :4], plain["image"][..., :4])


def test_a_masked_step_is_a_detached_velocity_and_does_not_count():
    # Steps 1 and 3 learn; step 1 passes through step 3, x' (1 - a / 4), and unchanged through step 2.
    mask = torch.tensor([True, True, False, True]).view(1, 4, 1, 1)
    experience, _ = linear_gradient(DRaFT())
    _, two = linear_gradient(DRaFT(steps=2), with_credit(experience, mask=mask))
    torch.testing.assert_close(two["image"][0], (1 + (1 - 0.5 / 4)) * MAP / 4)
    # A window far from the end learns as well.
    window = torch.tensor([True, False, False, False]).view(1, 4, 1, 1)
    _, early = linear_gradient(DRaFT(), with_credit(experience, mask=window))
    torch.testing.assert_close(early["image"][0], MAP / 4)
    torch.testing.assert_close(
        early["slope"], (MAP * experience.trajectory.latents[:, 0]).sum(dim=(1, 2, 3)).mean() / 4
    )


def test_every_rollout_starts_from_its_own_stored_state():
    # Masks of their own: the gradient of each rollout is that which it has alone.
    objective = DRaFT(steps=1)
    algorithm = toy_algorithm(objective, sampler=SDE(num_steps=6, window=(0, 5)))
    experience = collect(toy_engine(algorithm), prompts=1, group_size=4).experience
    mask = torch.ones(4, 6, 1, 1, dtype=torch.bool)
    mask[1, 3:], mask[2, 5:], mask[3] = False, False, False
    experience = with_credit(experience, mask=mask)
    alone = [gradient(objective, experience.take(torch.tensor([row]))) for row in range(3)]
    together = gradient(objective, experience)
    assert_same(together, {name: sum(part[name] for part in alone) / 4 for name in together})  # type: ignore[misc]


def test_weights_of_each_step_apply_to_its_own_velocity():
    # As in two steps by hand, with weight 3 on step 2 and 1/2 on step 3; the path through step 3 has its weight too.
    weight = torch.tensor([1.0, 1.0, 3.0, 0.5]).view(1, 4, 1, 1)
    experience, _ = linear_gradient(DRaFT())
    _, found = linear_gradient(DRaFT(steps=2), with_credit(experience, weight=weight))
    torch.testing.assert_close(found["image"][0], (0.5 + 3 * (1 - 0.5 * 0.5 / 4)) * MAP / 4)


@pytest.mark.parametrize("objective", [DRaFT(), ReFL()], ids=["draft", "refl"])
def test_the_advantage_plays_no_part_and_tied_groups_teach(objective: Objective):
    algorithm = toy_algorithm(objective, sampler=ODE(num_steps=6))
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    tied = with_credit(experience, advantage=torch.zeros(8, 1, 1, 1))
    assert_same(gradient(objective, tied), gradient(objective, experience), exactly=True)
    assert toy_learner(algorithm).learn(tied)["informative"] == 1.0
    invalid = attrs.evolve(experience, rewards=attrs.evolve(experience.rewards, valid=torch.arange(8) % 4 != 0))
    assert toy_learner(algorithm).learn(invalid)["informative"] == 1.0


@pytest.mark.parametrize("objective", [DRaFT(), ReFL()], ids=["draft", "refl"])
def test_a_group_of_one_will_do_unless_the_map_compares(objective: Objective):
    algorithm = toy_algorithm(objective, sampler=ODE(num_steps=6))
    algorithm.check_group_size(1)
    alone = collect(toy_engine(algorithm), prompts=3, group_size=1).experience
    assert toy_learner(algorithm).learn(alone)["grad_norm"] > 0
    comparing = Product(advantage=GroupRelative(), allocations=(ResidualContrast(),))
    with pytest.raises(ValueError, match="group_size=1"):
        toy_algorithm(objective, credit=comparing, sampler=ODE(num_steps=6)).check_group_size(1)


def test_a_run_may_have_groups_of_one(tmp_path: Path):
    text = TOY.replace("group_size: 4", "group_size: 1").replace("{type: ClippedSurrogate, clip_range: 1e-3}", "DRaFT")
    recipe = recipe_from_mapping(parse_yaml(text))
    train(recipe, tmp_path / "run")
    logged = read_metrics(tmp_path / "run", "train")
    assert [record["step"] for record in logged] == [1, 2]
    assert all(record["grad_norm"] > 0 and record["reward/tied_groups"] == 1 for record in logged)


# ---------------------------------------------------------------------------------------------- penalty and plumbing


@pytest.mark.parametrize(
    "objective",
    [DRaFT(steps=2, kl_penalty=VelocityPenalty(weight=0.5)), ReFL(kl_penalty=VelocityPenalty(weight=0.5))],
    ids=["draft", "refl"],
)
def test_distance_from_the_reference_by_hand(objective: Objective):
    algorithm, experience = linear(objective)
    learner = toy_learner(algorithm)
    assert learner.sets.names == ("reference",) or list(learner.sets.names) == ["reference"]
    with torch.no_grad():
        algorithm.policy.image.add_(0.1)  # type: ignore[union-attr]
    context = learner._context(4, 2, on_policy=True)
    losses = list(objective.losses(learner.policy, experience, context=context))
    for loss in losses:
        torch.testing.assert_close(loss.metrics["kl/reference"], torch.full((4,), 0.01), rtol=1e-4, atol=0)
    name = "draft" if isinstance(objective, DRaFT) else "refl"
    reward_part = torch.cat([loss.metrics[f"loss/{name}"] for loss in losses]).mean()
    torch.testing.assert_close(sum(loss.value.detach() for loss in losses), reward_part + 0.5 * 0.01)


def test_micro_batches_make_room_for_the_steps():
    algorithm = toy_algorithm(DRaFT(steps=3), sampler=ODE(num_steps=6))
    experience = collect(toy_engine(algorithm), prompts=2, group_size=4).experience
    sizes: list[int] = []
    velocity = algorithm.policy.velocity  # type: ignore[union-attr]
    algorithm.policy.velocity = lambda x, *rest: sizes.append(len(x)) or velocity(x, *rest)  # type: ignore[union-attr]
    toy_learner(algorithm, micro_batch_size=9).learn(experience)
    assert sizes == [3, 3, 3, 3, 3, 3, 2, 2, 2]


@attrs.frozen(kw_only=True)
class Signed(Mapped):
    """The map, with the sign that the metadata asks for."""

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return super().score_tensor(images, prompts, metadata) * torch.tensor([entry["sign"] for entry in metadata])


def signed_prompts() -> Prompts:
    return Prompts(
        texts=("up", "down"), group_size=3, metadata=({"sign": 1.0}, {"sign": -1.0}), core=((), ()), draws=(0, 1)
    )


@pytest.mark.parametrize("rollout_batch_size", [1, 4, 100])
def test_every_image_is_judged_under_its_own_prompt(rollout_batch_size: int):
    latents = torch.randn(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    found = reward_gradient(
        Linear(), Signed(), latents, signed_prompts().ungrouped(), rollout_batch_size=rollout_batch_size
    )
    signs = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    torch.testing.assert_close(found.gradient, signs[:, None, None, None] * MAP.expand(6, -1, -1, -1))
    torch.testing.assert_close(found.scores, signs * (latents * MAP).sum(dim=(1, 2, 3)))
    assert not found.scores.requires_grad
    assert not found.gradient.requires_grad


def test_prompts_follow_their_rollouts():
    algorithm = Algorithm(policy=Linear(), sampler=ODE(num_steps=2), reward=Signed(), credit=UNIFORM, objective=DRaFT())
    experience = toy_engine(algorithm).collect(signed_prompts(), iteration=0).experience
    assert experience.prompts.texts == ("up", "up", "up", "down", "down", "down")
    mixed = experience.take(torch.tensor([4, 0, 5]))
    assert [entry["sign"] for entry in mixed.prompts.metadata] == [-1.0, 1.0, -1.0]
    # Two go down and one goes up: what is left of -MAP/2 is a third of the way down.
    found = gradients(toy_learner(algorithm), mixed)
    torch.testing.assert_close(found["image"][0], -MAP / 2 / 3)
    with pytest.raises(ValueError, match=r"prompts.ungrouped"):
        attrs.evolve(experience, prompts=signed_prompts())


def test_the_image_decoder_of_sd3_recomputes_its_blocks_where_a_gradient_flows():
    from rlt2i.policies.sd3 import SD3

    policy = SD3().load()
    assert policy.vae.decoder.gradient_checkpointing  # type: ignore[union-attr]
    latents = torch.randn(2, *policy.latent_shape(32), generator=torch.Generator().manual_seed(0))
    found = reward_gradient(policy, Bright(), latents, Prompts.of(["", ""]), rollout_batch_size=2)
    change = 0.05 * found.gradient / found.gradient.norm()
    with torch.no_grad():
        ahead, behind = (policy.decode(latents + sign * change).mean(dim=(1, 2, 3)).sum() for sign in (1, -1))
    expected = 2 * (found.gradient * change).sum()
    torch.testing.assert_close(ahead - behind, expected, rtol=0.05, atol=1e-6)


@attrs.frozen(kw_only=True)
class Bright(Reward):
    """Mean brightness; `attached` says whether the scores carry the gradient that they promise."""

    offers = frozenset({"gradient"})

    attached: bool = True

    def score_tensor(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return (images if self.attached else images.detach()).mean(dim=(1, 2, 3))

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        scores = batch.images.float().mean(dim=(1, 2, 3)) / 255
        return RewardOutput(scores=scores, valid=torch.ones(len(scores), dtype=torch.bool))


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReFL(window=(3, 3)), "first < last"),
        (lambda: ReFL(window=(-1, 3)), "first < last"),
        (lambda: ReFL(grad_scale=0.0), "grad_scale"),
        (lambda: DRaFT(steps=0), "steps"),
        (lambda: DRaFT(steps=2, renoised=1), "steps=1, or renoised=0"),
        (lambda: DRaFT(truncation="sometimes"), "truncation"),
        (lambda: toy_algorithm(DRaFT(steps=7), sampler=ODE(num_steps=6)), "Use steps <= 6"),
        (lambda: toy_algorithm(ReFL(window=(4, 7)), sampler=ODE(num_steps=6)), "Use last <= 6"),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@attrs.frozen(kw_only=True)
class Scores(QuadrantBrightness):
    """Scores alone."""

    offers = frozenset({"maps"})


@pytest.mark.parametrize("reward", [Scores(), Guarded(reward=Scores())], ids=["bare", "guarded"])
@pytest.mark.parametrize("objective", [DRaFT(), ReFL()], ids=["DRaFT", "ReFL"])
def test_a_reward_without_gradient_is_refused(objective: Objective, reward: Reward):
    with pytest.raises(ValueError, match=r"needs \['gradient'\] from the reward.*Use a reward that offers it"):
        toy_algorithm(objective, reward=reward)


def test_a_reward_that_only_promises_a_gradient_is_found_out():
    with pytest.raises(ValueError, match="scores without a gradient"):
        reward_gradient(
            Linear(), Bright(attached=False), torch.zeros(1, 3, SIDE, SIDE), Prompts.of(["x"]), rollout_batch_size=1
        )
