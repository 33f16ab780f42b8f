"""Laws of images: their form, their gradient, and the way back to latents."""

from __future__ import annotations

import torch

from rlt2i.conformance.subject import Subject, require
from rlt2i.types import height_and_width


def form_of_images(subject: Subject) -> str:
    """decode gives [N, 3, height, width] contiguous float32 in [0, 1], square or not."""
    low, high = float("inf"), -float("inf")
    for size in subject.sizes:
        latents = 3 * subject.noise(size)[:2]  # beyond what a rollout ends at, so that a missing clamp shows
        with torch.no_grad():
            images = subject.policy.decode(latents)
        expected = [2, 3, *height_and_width(size)]
        require(
            list(images.shape) == expected, f"decode gives {list(images.shape)} at size {size}, expected {expected}."
        )
        require(images.dtype is torch.float32, f"decode gives {images.dtype}; images are float32 in [0, 1].")
        low, high = min(low, float(images.min())), max(high, float(images.max()))
        require(bool(torch.isfinite(images).all()), "decode gives NaN or infinity.")
        require(
            low >= 0 and high <= 1,
            f"decode gives values from {low:.3g} to {high:.3g}; images lie in [0, 1]: (x / 2 + 0.5).clamp(0, 1).",
        )
        require(
            images.is_contiguous(),
            f"decode gives images with strides {images.stride()}: rewards and files take contiguous ones. End with "
            ".contiguous().",
        )
    return f"values from {low:.3f} to {high:.3f}"


def images_of_rows(subject: Subject) -> None:
    """An image does not depend on those decoded beside it."""
    with torch.no_grad():
        together = subject.policy.decode(subject.latents[:3])
        alone = torch.cat([subject.policy.decode(row[None]) for row in subject.latents[:3]])
    apart = float((together - alone).abs().max())
    require(apart < 50 * subject.tolerance, f"an image differs by {apart:.1e} when it is decoded alone.")


def gradient_of_images(subject: Subject) -> None:
    """Gradients flow through decode, for rewards that are differentiated."""
    leaf = (0.3 * subject.latents[:1]).requires_grad_()
    brightness = subject.policy.decode(leaf).mean()
    gradient = torch.autograd.grad(brightness, leaf, allow_unused=True)[0] if brightness.requires_grad else None
    require(
        gradient is not None and bool(gradient.abs().sum() > 0),
        "gradients stop in decode: reward gradients would be zero. Do not decode under no_grad.",
    )


def way_back(subject: Subject) -> str:
    """encode_images gives float32 latents of the decoded shape, the same ones twice, or says that it cannot."""
    images = torch.rand(2, 3, *height_and_width(subject.size), generator=torch.Generator().manual_seed(0))
    images = images.to(subject.device)
    try:
        with torch.no_grad():
            first, second = subject.policy.encode_images(images), subject.policy.encode_images(images)
    except ValueError as error:
        return f"not offered: {str(error).splitlines()[0][:60]}"
    expected = [2, *subject.policy.latent_shape(subject.size)]
    require(
        list(first.shape) == expected and first.dtype is torch.float32,
        f"encode_images gives {list(first.shape)} {first.dtype}, expected {expected} float32.",
    )
    require(
        torch.equal(first, second),
        "encode_images draws: the same images have two encodings. Take the mean of the autoencoder's posterior.",
    )
    return ""


LAWS = (form_of_images, images_of_rows, gradient_of_images, way_back)
