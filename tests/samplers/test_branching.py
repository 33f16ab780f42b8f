"""Trees and branches: what is shared, what is not, what it costs, and that every step is what the kernel says."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor

from rlt2i.captures import EDGES
from rlt2i.credit.algebra import Product
from rlt2i.credit.tree import TreeAdvantage
from rlt2i.functional.transitions import euler
from rlt2i.interfaces import Sampler
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.reduction import trainable_steps
from rlt2i.recipes import load_recipe
from rlt2i.samplers.branching import BranchSDE, TreeSDE
from rlt2i.samplers.chunked import rollout, rollout_keys
from rlt2i.samplers.kernels import CPS, DDIM, DanceSDE, FlowSDE
from rlt2i.seeds import RolloutNoise, derive_seed
from rlt2i.tasks.base import as_prompts
from rlt2i.training.dry_run import batch_plan
from rlt2i.types import Experience
from tests.helpers.build import UNIFORM, collect, toy_algorithm, toy_engine
from tests.helpers.toy import CAPTURE, SIDE, ToyTask

DOCS = Path(__file__).parents[2] / "docs" / "algorithms"
TREE = TreeSDE(num_steps=6, splits=(0, 2, 4))
BRANCHES = BranchSDE(num_steps=6, steps=(1, 4), branches=2)
SIZES: dict[Sampler, int] = {TREE: 8, BRANCHES: 6}
both = pytest.mark.parametrize("sampler", [TREE, BRANCHES], ids=lambda s: type(s).__name__)


def rolled(sampler: Sampler, *, chunk: int = 64, prompts: int = 2, **options) -> Experience:
    algorithm = toy_algorithm(ClippedSurrogate(), sampler=sampler)
    engine = toy_engine(algorithm, rollout_batch_size=chunk)
    return collect(engine, prompts=prompts, group_size=SIZES.get(sampler, 8), **options).experience


@both
def test_shared_states_are_equal_and_others_are_not(sampler):
    size = SIZES[sampler]
    latents = rolled(sampler).trajectory.latents
    states = sampler.paths.states
    for group in latents.split(size):
        for step in range(6):
            for one in range(size):
                for other in range(one):
                    same = bool(states[one, step] == states[other, step])
                    assert torch.equal(group[one, step], group[other, step]) == same
        assert len(group[:, -1].unique(dim=0)) == size
    assert not torch.equal(latents[0, 0], latents[size, 0])


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), CPS(), DDIM()], ids=lambda k: type(k).__name__)
@both
def test_noisy_steps_are_the_kernels_and_all_others_the_odes(sampler, kernel):
    sampler = attrs.evolve(sampler, kernel=kernel)
    algorithm = toy_algorithm(ClippedSurrogate(), sampler=sampler)
    size = len(sampler.paths.states)
    prompts = as_prompts(ToyTask().train_prompts(seed=0, start=0, count=2), group_size=size, start=0)
    trajectory = toy_engine(algorithm).collect(prompts, iteration=0).experience.trajectory
    edges = sampler.paths.edges.repeat(2, 1)
    assert torch.equal(trajectory.captures[EDGES], edges)
    assert torch.equal(trajectory.noisy, edges >= 0)
    assert tuple(trajectory.stochastic.nonzero()[:, 0].tolist()) == sampler.stochastic_steps(0)
    seeds = [derive_seed("steps", *key) for key in rollout_keys(prompts, 1)]
    noise = RolloutNoise(seeds, seeds)
    first_of = torch.arange(2).repeat_interleave(size) * size
    for step in range(6):
        state, sigma = trajectory.latents[:, step], trajectory.sigmas
        now, then = sigma[step].expand(2 * size), sigma[step + 1].expand(2 * size)
        with torch.no_grad():
            velocity = algorithm.policy.velocity(state, now, trajectory.conditioning)
        noisy = edges[:, step] >= 0
        flowing = euler(state, velocity, now, then).mean
        close(trajectory.latents[~noisy, step + 1], flowing[~noisy])
        assert (trajectory.log_probs[~noisy, step] == 0).all()
        if not noisy.any():
            continue
        # Every branch has the noise that the first rollout behind it draws at this step, and no other.
        drawn = noise.step((3, SIDE, SIDE))[(first_of + edges[:, step])[noisy]]
        transition = kernel.transition(state, velocity, now, then, sigma_max=float(sigma[1]))
        std = transition.std.expand(2 * size, -1, -1, -1)
        close(trajectory.latents[noisy, step + 1], transition.mean[noisy] + std[noisy] * drawn)
        replayed = kernel.log_prob_map(trajectory.latents[:, step + 1], transition)[noisy]
        torch.testing.assert_close(trajectory.log_probs[noisy, step], replayed, atol=2e-4, rtol=2e-4)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@both
def test_a_group_starts_from_the_initial_noise_of_its_first_rollout(sampler):
    start = rolled(sampler).trajectory.latents[:, 0]
    alone = toy_algorithm(ClippedSurrogate())
    expected = collect(toy_engine(alone), prompts=2, group_size=SIZES[sampler]).experience.trajectory.latents[:, 0]
    assert torch.equal(start, expected[:: SIZES[sampler]].repeat_interleave(SIZES[sampler], dim=0))


@pytest.mark.parametrize(
    ("sampler", "per_step"),
    [
        (TREE, [1, 2, 2, 4, 4, 8]),
        (TreeSDE(num_steps=6, splits=(3,), width=4), [1, 1, 1, 1, 4, 4]),
        (BRANCHES, [1, 1, 3, 5, 6, 6]),  # the trunk, as long as a branch leaves it, and the branches so far
        (BranchSDE(num_steps=6, branches=2), [1, 3, 5, 7, 9, 10]),
    ],
)
def test_the_network_sees_each_state_once(sampler, per_step):
    algorithm = toy_algorithm(ClippedSurrogate(), sampler=sampler)
    asked: list[int] = []
    velocity = algorithm.policy.velocity
    algorithm.policy.velocity = lambda latents, *rest: asked.append(len(latents)) or velocity(latents, *rest)
    collect(toy_engine(algorithm), prompts=3, group_size=len(sampler.paths.states))
    assert asked == [3 * count for count in per_step]


@both
def test_captures_are_those_of_the_state_that_a_rollout_stands_at(sampler):
    algorithm = toy_algorithm(ClippedSurrogate(), sampler=sampler)
    names = frozenset({CAPTURE, "clean_predictions"})
    prompts = as_prompts(ToyTask().train_prompts(seed=0, start=0, count=2), group_size=SIZES[sampler], start=0)
    found = rollout(algorithm.policy, sampler, prompts, seed=1, image_size=SIDE, rollout_batch_size=64, captures=names)
    for step in range(6):
        state, sigma = found.latents[:, step], found.sigmas[step].expand(found.num_rollouts)
        velocity, captured = algorithm.policy.velocity_with_captures(
            state, sigma, found.conditioning, frozenset({CAPTURE})
        )
        close(found.captures[CAPTURE][:, step], captured[CAPTURE])
        close(found.captures["clean_predictions"][:, step], state - sigma.view(-1, 1, 1, 1) * velocity.detach())


@both
def test_rollouts_do_not_depend_on_chunks_or_order(sampler):
    whole, chunked = rolled(sampler).trajectory, rolled(sampler, chunk=SIZES[sampler] + 3).trajectory
    second = rolled(sampler, prompts=1, first=1).trajectory
    close(chunked.latents, whole.latents)
    close(second.latents, whole.latents[SIZES[sampler] :])
    assert torch.equal(chunked.captures[EDGES], whole.captures[EDGES])
    assert torch.equal(second.captures[EDGES], whole.captures[EDGES][SIZES[sampler] :])


def test_a_rollout_off_a_trunk_is_trained_at_its_own_step_only_whatever_the_credit():
    experience = rolled(BRANCHES)
    assert experience.credit.mask.all()  # group-relative: this is the sampler's doing
    trained = trainable_steps(experience, stochastic_only=True)
    assert trained.nonzero().tolist() == [[row, 1 + row % 6 // 2] for row in range(12)]


@pytest.mark.parametrize(
    ("recipe", "sequences", "edges", "separate"),
    [("branch-grpo-shapes", 53, 28, 80), ("tempflow-shapes", 240, 36, 360), ("tempflow-sd35-geneval", 279, 54, 540)],
)
def test_budgets_of_the_recipes_are_those_on_their_pages(recipe, sequences, edges, separate):
    sampler = load_recipe(recipe).sampler
    states, taken = sampler.paths
    assert sum(len(column.unique()) for column in states.T) == sequences
    assert sum(len(column[column >= 0].unique()) for column in taken.T) == edges
    assert states.numel() == separate
    page = (DOCS / f"{recipe.removesuffix('-sd35-geneval').removesuffix('-shapes')}.md").read_text(encoding="utf-8")
    (budget,) = [part for part in page.split("\n\n") if part.startswith("**Budget**")]
    for number in (sequences, edges, separate):
        assert f" {number}" in budget.replace("\n", " ")


def test_plans_count_what_a_rollout_is_trained_at():
    assert (TREE.noisy_steps, BRANCHES.noisy_steps) == (5, 1)
    assert batch_plan(load_recipe("tempflow-shapes"), world_size=1).trained_steps == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TreeSDE(splits=()), "branches at one noisy step or more"),
        (lambda: TreeSDE(splits=(3, 0)), "in increasing order"),
        (lambda: TreeSDE(splits=(2, 2)), "different steps"),
        (lambda: TreeSDE(num_steps=10, splits=(0, 9)), "from 0 to 8"),
        (lambda: TreeSDE(num_steps=10, splits=(0, 5), last=4), "from 0 to 3"),
        (lambda: TreeSDE(num_steps=4, splits=(0,), last=5), "0 < last <= 4"),
        (lambda: TreeSDE(width=1), "width"),
        (lambda: BranchSDE(branches=1), "branches"),
        (lambda: BranchSDE(num_steps=4, steps=(2, 5)), "0 <= first < last <= 4"),
        (lambda: BranchSDE(num_steps=4, steps=(2, 2)), "leave the trunk somewhere"),
    ],
)
def test_bad_trees_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@both
def test_a_group_that_does_not_fit_the_branches_is_refused_with_the_number_that_does(sampler):
    algorithm = toy_algorithm(ClippedSurrogate(), sampler=sampler)
    with pytest.raises(ValueError, match=f"makes {SIZES[sampler]} rollouts .* Use group_size={SIZES[sampler]}"):
        algorithm.check_group_size(12)
    algorithm.check_group_size(SIZES[sampler])
    with pytest.raises(ValueError, match=f"Use group_size={SIZES[sampler]}"):
        collect(toy_engine(algorithm), prompts=1, group_size=4)


def test_a_group_that_does_not_fit_into_memory_is_refused_before_anything_is_loaded():
    recipe = load_recipe("branch-grpo-shapes", ["train.rollout_batch_size=7"])
    with pytest.raises(ValueError, match="Use rollout_batch_size >= 8"):
        batch_plan(recipe, world_size=1)
    recipe = load_recipe("branch-grpo-shapes", ["train.rollout_batch_size=50"])
    assert batch_plan(recipe, world_size=1).rollout_batch_size == 48


def test_tree_credit_needs_a_sampler_that_branches():
    credit = Product(advantage=TreeAdvantage())
    with pytest.raises(ValueError, match=r"TreeAdvantage needs .*edges.* Use a sampler whose rollouts branch"):
        toy_algorithm(ClippedSurrogate(), credit=credit)
    assert toy_algorithm(ClippedSurrogate(), credit=credit, sampler=TREE).captures == {EDGES}
    assert toy_algorithm(ClippedSurrogate(), credit=UNIFORM, sampler=TREE).captures == frozenset()
