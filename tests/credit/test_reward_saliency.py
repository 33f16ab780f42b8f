"""Reward saliency: by hand, and what it says about a reward that looks at one corner."""

from __future__ import annotations

import attrs
import pytest
import torch

from rlt2i.credit.algebra import Product
from rlt2i.credit.group_relative import GroupRelative
from rlt2i.credit.reward_saliency import RewardSaliency
from rlt2i.interfaces import RewardGradient
from rlt2i.objectives.clipped_surrogate import ClippedSurrogate
from rlt2i.samplers.ode import ODE
from rlt2i.samplers.sde import SDE
from tests.helpers.build import collect, toy_algorithm, toy_engine
from tests.helpers.credit_contexts import make_context
from tests.objectives.test_reward_backprop import Scores


def bare(**options: object) -> RewardSaliency:
    return RewardSaliency(blur=0.0, mix=1.0, floor=1e-9, **options)  # type: ignore[arg-type]


def corner(latents: torch.Tensor, rollouts: torch.Tensor) -> RewardGradient:
    """Gradient 3, 1, -1 and -1 in the four tokens of both channels."""
    tokens = torch.tensor([[3.0, 1.0], [-1.0, -1.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return RewardGradient(scores=latents.sum(dim=(1, 2, 3)), gradient=tokens.expand_as(latents))


def test_the_map_by_hand():
    context = attrs.evolve(make_context([0.0, 1.0], group_size=2), reward_gradient=corner)
    # |3|, |1|, |-1|, |-1| with mean 1.5.
    expected = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).expand(2, 1, 2, 2) / 1.5
    torch.testing.assert_close(bare().weight(context), expected)
    half = RewardSaliency(blur=0.0, mix=0.5, floor=1e-9).weight(context)
    torch.testing.assert_close(half, 0.5 + 0.5 * expected)


def test_gradient_times_input_by_hand():
    latents = torch.ones(2, 5, 2, 4, 4)
    latents[:, :, 1] = -1.0
    latents[:, :, :, 0, 0] = 1.0
    context = attrs.evolve(make_context([0.0, 1.0], group_size=2, latents=latents), reward_gradient=corner)
    # Two channels of opposite sign cancel everywhere but at the first place: 6 there, a quarter of the first token.
    found = bare(form="gradient_times_input").weight(context)
    torch.testing.assert_close(found[0, 0], torch.tensor([[4.0, 0.0], [0.0, 0.0]]), atol=1e-6, rtol=0)


def test_every_step_has_the_map_of_its_own_prediction():
    context = make_context([0.0, 1.0], group_size=2)  # here the gradient is the latents themselves
    found = bare(at="predictions").weight(context)
    assert found.shape == (2, 4, 2, 2)
    size = context.trajectory.captures["clean_predictions"].abs().sum(dim=2)
    tokens = size.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean(dim=(-3, -1))
    torch.testing.assert_close(found, tokens / tokens.mean(dim=(2, 3), keepdim=True))


def test_what_was_not_judged_and_what_has_no_gradient_is_uniform():
    flat = lambda latents, rollouts: RewardGradient(scores=latents[:, 0, 0, 0], gradient=0 * latents)
    context = make_context([0.0, 1.0, 2.0, 3.0], group_size=4, valid=[True, False, True, True])
    found = bare().weight(context)
    assert torch.equal(found[1], torch.ones(1, 2, 2))
    assert not torch.allclose(found[0], torch.ones(1, 2, 2))
    assert torch.equal(bare().weight(attrs.evolve(context, reward_gradient=flat)), torch.ones(4, 1, 2, 2))
    never = attrs.evolve(context, rewards=attrs.evolve(context.rewards, valid=torch.zeros(4, dtype=torch.bool)))
    assert torch.equal(bare().weight(never), torch.ones(4, 1, 2, 2))


def test_it_finds_the_corner_that_the_toy_reward_looks_at():
    for part, causality in ((bare(), "outcome"), (bare(at="predictions"), "state")):
        credit = Product(advantage=GroupRelative(), allocations=(part,))
        algorithm = toy_algorithm(ClippedSurrogate(), credit=credit, sampler=SDE(num_steps=4, window=(0, 2)))
        found = collect(toy_engine(algorithm), prompts=2, group_size=4).experience.credit
        assert found.causality == causality
        weight = found.weight
        assert weight.shape[1] == (1 if causality == "outcome" else 4)
        # The corner weighs 1/2 and the rest -1/6 per place, and the decoder's slope is about the same in both.
        inside, everywhere = weight[..., :2, :2].mean(dim=(2, 3)), weight.mean(dim=(2, 3))
        assert (inside > 1.5 * everywhere).all()


def test_it_is_refused_where_the_reward_has_no_gradient():
    credit = Product(advantage=GroupRelative(), allocations=(RewardSaliency(),))
    with pytest.raises(ValueError, match=r"RewardSaliency needs \['gradient'\] from the reward"):
        toy_algorithm(ClippedSurrogate(), credit=credit, reward=Scores())


@pytest.mark.parametrize("options", [{"at": "once"}, {"form": "signed"}, {"blur": -1.0}, {"mix": 2.0}, {"floor": 0.0}])
def test_bad_values_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RewardSaliency(**options)


def test_deterministic_rollouts_have_it_too():
    credit = Product(advantage=GroupRelative(), allocations=(RewardSaliency(at="predictions"),))
    from rlt2i.objectives.nft import DiffusionNFT

    algorithm = toy_algorithm(DiffusionNFT(), credit=credit, sampler=ODE(num_steps=3))
    assert collect(toy_engine(algorithm), prompts=1, group_size=2).experience.credit.weight.shape == (2, 3, 4, 4)
