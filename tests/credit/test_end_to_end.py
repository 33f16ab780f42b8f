"""Every part drives a real update of the toy policy."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.credit.algebra import Advantage, Allocation, Mask, Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.interfaces import RewardBatch, RewardOutput
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.objectives.nft import DiffusionNFT
from rlt2i.samplers.sde import SDE
from rlt2i.types import Region
from tests.credit.test_laws import ALLOCATIONS, COMPARING, LABELS, MASKS, name
from tests.helpers.build import collect, gradients, learning_curve, toy_algorithm, toy_engine, toy_learner
from tests.helpers.toy import QuadrantBrightness


@attrs.frozen(kw_only=True)
class Judged(QuadrantBrightness):
    """With terms and signed regions."""

    def score(self, batch: RewardBatch, want: frozenset[str] = frozenset()) -> RewardOutput:
        output = super().score(batch, want)
        corner = Region(box=(0.0, 0.0, 0.5, 0.5), credit=1.0)
        rest = Region(box=(0.5, 0.0, 1.0, 1.0), credit=-1.0)
        return attrs.evolve(
            output,
            components={"a": output.scores, "b": -output.scores.square()},
            regions=[[corner, rest] for _ in batch.prompts] if "regions" in want else None,
        )


def product(part: Advantage | Allocation | Mask) -> Product:
    if isinstance(part, Advantage):
        return Product(advantage=part)
    if isinstance(part, Allocation):
        return Product(advantage=GroupRelative(), allocations=(part,))
    return Product(advantage=GroupRelative(), masks=(part,))


@pytest.mark.parametrize("objective", [ClippedSurrogate(), DiffusionNFT()], ids=name)
@pytest.mark.parametrize("part", [*COMPARING, *LABELS, *ALLOCATIONS, *MASKS], ids=name)
def test_every_part_gives_a_finite_gradient(part: Advantage | Allocation | Mask, objective):
    sampler = SDE(num_steps=6, window=(0, 4))
    algorithm = toy_algorithm(objective, credit=product(part), sampler=sampler, reward=Judged())
    found = gradients(toy_learner(algorithm), collect(toy_engine(algorithm), prompts=2).experience)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert any((gradient != 0).any() for gradient in found.values())


@pytest.mark.parametrize("part", COMPARING, ids=name)
def test_an_advantage_learns(part: Advantage):
    sampler = SDE(num_steps=6, window=(0, 3))
    algorithm = toy_algorithm(ClippedSurrogate(clip_range=1e-2), credit=product(part), sampler=sampler, reward=Judged())
    rewards = learning_curve(algorithm, updates=8)
    assert rewards[-1] > rewards[0] + 0.01, rewards


def test_completing_with_the_engine_ends_where_the_rollout_did():
    # After the last noisy step the rollout is its own completion, so the last gain needs no completion of its own.
    algorithm = toy_algorithm(ClippedSurrogate(), credit=product(COMPARING[3]), sampler=SDE(num_steps=6, window=(0, 3)))
    engine = toy_engine(algorithm)
    ends = []
    assign = type(algorithm.credit).assign

    def spy(self, context):
        rows = torch.arange(context.trajectory.num_rollouts)
        ends.append((context.complete(context.trajectory.latents[:, 3], 3, rows), context.trajectory.clean_latents))
        return assign(self, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Product, "assign", spy)
        collect(engine, prompts=2)
    torch.testing.assert_close(*ends[0])
