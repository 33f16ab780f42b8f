"""What is Qwen-Image-2.1's own: a direction that does not exist, levels that its author set, opacity, lengths."""

from __future__ import annotations

import pytest
import torch

from rlt2i.functional.transfer import chosen, on_both, on_host
from rlt2i.policies.pretrained.autoencoder import on_white
from rlt2i.policies.qwen_image21 import QwenImage21
from rlt2i.policies.tiny import save_tiny
from rlt2i.recipes import load_recipe
from tests.helpers.pretend_device import DEVICE, pretend_device


def test_text_that_does_not_look_at_the_image_is_refused_before_weights_are_read():
    """The published configuration ships, and no weight is here to be read."""
    assert not any(name.startswith("attention/text_to_image") for name in QwenImage21().offers)
    recipe = load_recipe("star-qwen-image-21-ocr", ["credit.allocations.0.direction=text_to_image"])
    with pytest.raises(ValueError, match=r"text_to_image.*neither QwenImage21 nor .*Change the credit's blocks or dir"):
        recipe.algorithm()


def test_levels_are_the_authors_where_there_are_as_many(tmp_path):
    own = [1.0, 0.7, 0.3]
    path = save_tiny("QwenImage21Pipeline", tmp_path, sample_sigmas=own)
    policy = QwenImage21(path=str(path)).load()
    assert policy.pipe.config.sample_sigmas == own
    noise = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    policy.pipe.set_progress_bar_config(disable=True)
    policy.pipe("a cat", latents=noise, height=64, width=64, output_type="latent")
    stock = policy.pipe.scheduler.sigmas.clone()
    assert torch.equal(policy.sigmas(3, 64), stock)
    assert not torch.equal(policy.sigmas(3, 64), policy.scheduler_sigmas(3, mu=policy.shift_of(16)))
    assert torch.equal(policy.sigmas(4, 64), policy.scheduler_sigmas(4, mu=policy.shift_of(16)))


def test_opacity_by_hand():
    clear, half, solid = (torch.tensor([0.2, 0.4, 1.0, a]).view(1, 4, 1, 1) for a in (0.0, 0.5, 1.0))
    assert on_white(clear).flatten().tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(on_white(half).flatten(), torch.tensor([0.6, 0.7, 1.0]))
    assert torch.equal(on_white(solid), solid[:, :3])
    assert torch.equal(on_white(solid[:, :3]), solid[:, :3])


def test_the_host_knows_what_was_chosen_from_what_it_knew():
    with pretend_device() as watch:
        rows, index = on_both(torch.tensor([5, 6, 7]), DEVICE), on_both(torch.tensor([2, 0]), DEVICE)
        watch.waits.clear()
        assert on_host(chosen(rows, index)).tolist() == [7, 5]
        assert watch.total == 0
        assert chosen(rows, index).device == DEVICE
