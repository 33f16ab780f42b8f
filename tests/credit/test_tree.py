"""Tree advantage: who is compared with whom, and that a step which rollouts share counts once in the update."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from rlt2i.captures import EDGES
from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.noise_aware import NoiseAware
from rlt2i.credit.random_subset import RandomSubset
from rlt2i.credit.text_attention import TextAttention
from rlt2i.credit.tree import TreeAdvantage
from rlt2i.functional.advantages import group_relative_advantage
from rlt2i.interfaces import CreditAssigner, Objective, Sampler
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.objectives.reduction import trainable_steps
from rlt2i.samplers.branching import BranchSDE, TreeSDE
from rlt2i.samplers.chunked import rollout
from rlt2i.samplers.kernels import FlowSDE
from rlt2i.samplers.ode import ODE
from rlt2i.types import Experience, Prompts
from tests.helpers.build import collect, gradients, toy_algorithm, toy_engine, toy_learner
from tests.helpers.credit_contexts import make_context
from tests.helpers.objective_cases import FORWARD, REVERSE, assert_same, with_credit
from tests.helpers.toy import SIDE
from tests.test_learning import Constant, Failing

TREE = TreeSDE(num_steps=4, splits=(0, 2), kernel=FlowSDE(noise_level=0.9))
"""Four leaves on 2 + 2 + 4 different noisy steps."""
BRANCHES = BranchSDE(num_steps=4, steps=(0, 3), branches=2, kernel=FlowSDE(noise_level=0.9))
CREDIT = Product(advantage=TreeAdvantage())
SIZES: dict[Sampler, int] = {TREE: 4, BRANCHES: 6}


def algorithm_of(objective: Objective, sampler: Sampler = TREE, credit: CreditAssigner = CREDIT, **more):
    return toy_algorithm(objective, sampler=sampler, credit=credit, **more)


def experience_of(objective: Objective, sampler: Sampler = TREE, credit: CreditAssigner = CREDIT, **more) -> Experience:
    algorithm = algorithm_of(objective, sampler, credit, **more)
    return collect(toy_engine(algorithm), prompts=2, group_size=SIZES[sampler]).experience


def gradient(objective: Objective, experience: Experience, sampler: Sampler = TREE) -> dict[str, Tensor]:
    return gradients(toy_learner(algorithm_of(objective, sampler)), experience)


# ------------------------------------------------------------------------------------------------------------- credit


def test_advantage_and_mask_by_hand():
    # Two groups of four leaves, two first steps each: values 1 3 and 5 5 (tied); population stds 1 and 0.
    context = make_context([0.0, 2.0, 3.0, 3.0, 4.0, 6.0, 7.0, 3.0], group_size=4)
    edges = torch.tensor([[0, 0, 0, -1], [0, 0, 1, -1], [2, 2, 2, -1], [2, 2, 3, -1]]).repeat(2, 1)
    trajectory = attrs.evolve(context.trajectory, captures={EDGES: edges})
    credit = CREDIT.assign(attrs.evolve(context, trajectory=trajectory))
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(credit.advantage[:, 0, 0, 0], expected, atol=1e-3, rtol=0)
    assert credit.mask[:, 0, 0, 0].tolist() == [True, False, True, False] * 2
    assert credit.mask[:, 2, 0, 0].all()
    assert credit.mask[:, 3, 0, 0].all()  # no step of a tree: nothing is counted twice there
    assert (credit.advantage[:, 3] == 0).all()
    assert credit.weight.shape == (1, 1, 1, 1)


def test_it_bounds_the_advantage():
    context = make_context([0.0] * 7 + [100.0], group_size=8)
    edges = torch.arange(8)[:, None].expand(-1, 4)
    context = attrs.evolve(context, trajectory=attrs.evolve(context.trajectory, captures={EDGES: edges}))
    assert TreeAdvantage(clip=2.0).advantage(context).max() == 2.0
    assert TreeAdvantage().advantage(context).max() > 2.0


def test_off_a_trunk_it_is_group_relative_per_prompt_and_step():
    experience = experience_of(ClippedSurrogate(), BRANCHES)
    advantage = experience.credit.advantage[:, :, 0, 0]
    rows = torch.arange(12)
    expected = group_relative_advantage(experience.rewards.final, 2)
    torch.testing.assert_close(advantage[rows, rows % 6 // 2], expected.float(), rtol=1e-4, atol=1e-4)
    assert (advantage != 0).sum() == 12


def test_it_composes_with_weights_over_time_and_space_and_with_masks():
    attention = TextAttention(blocks="0", doubt=0.0)
    credit = Product(advantage=TreeAdvantage(), allocations=(NoiseAware(), attention), masks=(RandomSubset(),))
    experience = experience_of(ClippedSurrogate(), TREE, credit)
    alone = experience_of(ClippedSurrogate(), TREE).credit
    found = experience.credit
    assert torch.equal(found.advantage, alone.advantage)
    assert found.weight.shape == (8, 4, 4, 4)
    torch.testing.assert_close(found.weight.mean(dim=(1, 2, 3)), torch.ones(8))
    assert not (found.mask & ~alone.mask).any()
    assert (alone.mask & ~found.mask).any()
    assert toy_learner(algorithm_of(ClippedSurrogate(), TREE, credit)).learn(experience)["grad_norm"] > 0


def test_maps_can_be_drawn_along_the_ode():
    # `rlt2i maps` draws rollouts by the ODE, whatever the recipe's sampler; there nothing branches.
    algorithm = algorithm_of(ClippedSurrogate())
    prompts = Prompts.of(["a"], group_size=2)
    found = rollout(
        algorithm.policy, ODE(num_steps=4), prompts, seed=0, image_size=SIDE, rollout_batch_size=2,
        captures=algorithm.captures,
    )  # fmt: skip
    assert (found.captures[EDGES] == -1).all()
    context = make_context([0.0, 1.0], group_size=2)
    credit = CREDIT.assign(attrs.evolve(context, trajectory=found))
    assert (credit.advantage == 0).all()


# ------------------------------------------------------------------------------------------------- edges count once


def one_at_a_time(experience: Experience) -> list[Tensor]:
    """A mask for each pair that is trained, which keeps this one only."""
    trained = trainable_steps(experience, stochastic_only=True) & experience.rewards.valid[:, None]
    masks = []
    for row, step in trained.nonzero().tolist():
        alone = torch.zeros_like(trained)
        alone[row, step] = True
        masks.append(alone[:, :, None, None])
    return masks


@pytest.mark.parametrize("reward", [None, Failing()], ids=["valid", "failing"])
@pytest.mark.parametrize("name", REVERSE)
def test_the_gradient_is_the_mean_over_different_steps(name: str, reward):
    # The update of the tree against an explicit list of its steps, each an update of its own.
    objective = REVERSE[name]
    experience = experience_of(objective, reward=reward)
    masks = one_at_a_time(experience)
    edges, valid = experience.trajectory.captures[EDGES], experience.rewards.valid
    listed = [
        (group, step, edge)
        for group in range(2)
        for step in range(3)
        for edge in edges[4 * group : 4 * group + 4, step][valid[4 * group : 4 * group + 4]].unique().tolist()
    ]
    assert len(masks) == len(listed) == (16 if reward is None else 13)
    found = gradient(objective, experience)
    total = {key: torch.zeros_like(value) for key, value in found.items()}
    for mask in masks:
        single = gradient(objective, with_credit(experience, mask=mask))
        total = {key: total[key] + single.get(key, torch.zeros_like(total[key])) for key in total}
    assert_same({key: value / len(masks) for key, value in total.items()}, found)
    assert found["image"].abs().sum() > 0


def test_the_gradient_is_that_of_an_explicit_list_of_edges():
    # On policy: the gradient of -mean over edges of A log p, written down without any learner.
    experience = experience_of(ClippedSurrogate())
    trajectory = experience.trajectory
    rows, steps = [], []
    for group in range(2):
        for step, leaves in enumerate(([0, 2], [0, 2], [0, 1, 2, 3])):
            rows += [4 * group + leaf for leaf in leaves]
            steps += [step] * len(leaves)
    pairs = experience.step_batch(torch.tensor(rows), torch.tensor(steps))
    policy = algorithm_of(ClippedSurrogate()).policy
    transition = trajectory.kernel.transition(
        pairs.latents,
        policy.velocity(pairs.latents, pairs.sigma, pairs.conditioning),
        pairs.sigma,
        pairs.sigma_next,
        sigma_max=trajectory.sigma_max,
    )
    log_prob = trajectory.kernel.log_prob_map(pairs.next_latents, transition).mean(dim=(1, 2))
    (-(pairs.advantage.flatten() * log_prob).sum() / 16).backward()
    expected = {name: parameter.grad for name, parameter in policy.trainable_parameters().items()}
    assert_same(gradient(ClippedSurrogate(), experience), expected)


def test_any_leaf_may_speak_for_a_shared_step():
    # Copies of a step are equal in everything that a loss looks at.
    objective = ClippedSurrogate()
    experience = experience_of(objective)
    found = gradient(objective, experience)
    mask = experience.credit.mask.clone()
    mask[[0, 1, 4, 5], :2] = mask[[1, 0, 5, 4], :2]
    assert not torch.equal(mask, experience.credit.mask)
    assert_same(gradient(objective, with_credit(experience, mask=mask)), found)


@pytest.mark.parametrize("name", REVERSE)
def test_off_a_trunk_only_a_rollouts_own_step_matters(name: str):
    # Whatever the credit says of the deterministic steps, they have no likelihood to change.
    objective = REVERSE[name]
    experience = experience_of(objective, BRANCHES, Product(advantage=GroupRelative()))
    found = gradient(objective, experience, BRANCHES)
    own = experience.trajectory.noisy[:, :, None, None]
    assert own.sum() == 12
    advantage = torch.where(own, experience.credit.advantage, 1e3)
    assert_same(gradient(objective, with_credit(experience, advantage=advantage), BRANCHES), found, exactly=True)


@pytest.mark.parametrize("sampler", [TREE, BRANCHES], ids=["tree", "trunk"])
@pytest.mark.parametrize("name", [*REVERSE, *FORWARD])
def test_every_objective_updates_under_tree_credit(name: str, sampler: Sampler):
    objective = (REVERSE | FORWARD)[name]
    metrics = toy_learner(algorithm_of(objective, sampler)).learn(experience_of(objective, sampler))
    assert 0 < metrics["grad_norm"] < float("inf")


@pytest.mark.parametrize("sampler", [TREE, BRANCHES], ids=["tree", "trunk"])
def test_later_updates_replay_the_steps_that_are_trained(sampler: Sampler):
    objective = ClippedSurrogate(clip_range=1e-2)
    algorithm = algorithm_of(objective, sampler)
    experience = collect(toy_engine(algorithm), prompts=4, group_size=SIZES[sampler]).experience
    learner = toy_learner(algorithm, micro_batch_size=5, optimizer_steps_per_iteration=2)
    trained = trainable_steps(experience, stochastic_only=True)
    replayed = learner._replayed(experience).trajectory.log_probs
    torch.testing.assert_close(replayed[trained], experience.trajectory.log_probs[trained], atol=1e-4, rtol=1e-4)
    assert learner.learn(experience)["ratio/abs_minus_one_max"] > 0


def test_tied_trees_cost_nothing():
    algorithm = algorithm_of(ClippedSurrogate(), reward=Constant())
    metrics = toy_learner(algorithm).learn(collect(toy_engine(algorithm), prompts=2, group_size=4).experience)
    assert metrics["informative"] == metrics["grad_norm"] == 0


@pytest.mark.parametrize("sampler", [TREE, BRANCHES], ids=["tree", "trunk"])
@pytest.mark.parametrize("objective", [ClippedSurrogate(clip_range=1e-2), DiffusionNFT()], ids=["clipped", "nft"])
def test_tree_credit_learns(objective: Objective, sampler: Sampler):
    algorithm = algorithm_of(objective, sampler)
    engine, learner = toy_engine(algorithm), toy_learner(algorithm, learning_rate=0.1)
    rewards = []
    for update in range(10):
        batch = collect(engine, update=update, group_size=SIZES[sampler])
        learner.learn(batch.experience)
        rewards.append(float(batch.scores.scores.mean()))
    assert abs(rewards[0] - 0.5) < 0.02
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.01, rewards
