"""Learning from the gradient of a reward: the pure functions, by hand."""

from __future__ import annotations

import pytest
import torch

from rlt2i.functional.reward_backprop import (
    first_order,
    gradient_saliency,
    last_steps,
    random_depth,
    refl_loss,
    scale_gradient,
)


def test_a_scaled_gradient_leaves_the_values_alone():
    x = torch.tensor([[0.1, -3.7, 1e-20]], requires_grad=True)
    y = scale_gradient(x, torch.tensor([[2.0, 0.0, 0.5]]))
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad((y * torch.tensor([[1.0, 10.0, 100.0]])).sum(), x)
    assert gradient.tolist() == [[2.0, 0.0, 50.0]]


def test_a_weight_never_expands_what_it_weighs():
    with pytest.raises(ValueError, match="would expand"):
        scale_gradient(torch.zeros(2, 3), torch.ones(4, 2, 3))


def test_first_order_has_the_value_and_the_gradient_that_it_is_given():
    latents = torch.full((2, 1, 1, 2), 3.0, requires_grad=True)
    gradient = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(2, 1, 1, 2)
    values = first_order(torch.tensor([5.0, 7.0]), gradient, latents)
    assert values.tolist() == [5.0, 7.0]
    (found,) = torch.autograd.grad((values * torch.tensor([1.0, -1.0])).sum(), latents)
    assert found.flatten().tolist() == [1.0, 2.0, -3.0, -4.0]
    with pytest.raises(ValueError, match="latent shapes differ"):
        first_order(torch.zeros(2), gradient[:1], latents)


def test_refl_by_hand():
    reward = torch.tensor([0.5, 2.0, 3.0], requires_grad=True)
    loss = refl_loss(reward, margin=2.0)
    assert loss.tolist() == [1.5, 0.0, 0.0]
    (slope,) = torch.autograd.grad(loss.sum(), reward)
    assert slope[0] == -1.0
    assert slope[2] == 0.0


def test_last_steps_by_hand():
    unmasked = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert last_steps(unmasked, 2).long().tolist() == [[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    depths = torch.tensor([1, 3, 1, 1])
    assert last_steps(unmasked, depths).long().tolist() == [[0, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_random_depth_by_hand():
    # 1 + floor(3 u)
    assert random_depth(torch.tensor([0.0, 0.4, 0.99]), 3).tolist() == [1, 2, 3]
    assert (random_depth(torch.rand(5, generator=torch.Generator().manual_seed(0)), 1) == 1).all()


def test_saliency_by_hand():
    gradient = torch.tensor([[1.0, -2.0], [3.0, 0.0]]).view(1, 2, 1, 2)
    latents = torch.tensor([[2.0, 1.0], [-1.0, 5.0]]).view(1, 2, 1, 2)
    assert gradient_saliency(gradient, latents).tolist() == [[[4.0, 2.0]]]
    # |2 - 3| and |-2 + 0|
    assert gradient_saliency(gradient, latents, form="gradient_times_input").tolist() == [[[1.0, 2.0]]]
    with pytest.raises(ValueError, match="Use 'gradient'"):
        gradient_saliency(gradient, latents, form="integrated")  # type: ignore[arg-type]
