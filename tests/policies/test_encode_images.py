"""Images to latents: the mean of the autoencoder, scaled as the pipeline scales it."""

from __future__ import annotations

import torch

from rlt2i.policies.guidance import Guided
from rlt2i.policies.sd3 import SD3, SD3Policy


def test_latents_are_the_mean_in_the_scale_of_the_pipeline(t5_pipeline, stock):
    policy, vae = SD3(path=str(t5_pipeline)).load(), stock(t5_pipeline).vae
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        posterior = vae.encode(2 * images - 1).latent_dist
        found = policy.encode_images(images)
    expected = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, *policy.latent_shape(32))
    assert posterior.std.mean() > 1e-3  # a draw would have differed
    assert torch.equal(Guided(policy=policy, scale=3.0).encode_images(images), policy.encode_images(images))


def test_the_embedded_autoencoder_gives_an_image_back():
    policy = SD3().load()
    assert isinstance(policy, SD3Policy)
    images = torch.full((1, 3, 32, 32), 0.85)
    images[:, 0, 8:20, 8:20], images[:, 1:, 8:20, 8:20] = 0.85, 0.1
    with torch.no_grad():
        again = policy.decode(policy.encode_images(images))
    assert (again - images).abs().mean() < 0.03
