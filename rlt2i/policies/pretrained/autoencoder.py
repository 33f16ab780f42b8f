"""Latents as the network sees them and as the autoencoder does: four normalisations are in use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlt2i.functional.transfer import to_device

_FRAMED = "z_dim"
"""Autoencoders of video models name their channels so; an image is a film of one frame to them."""

_RGBA = 4


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents [N, C, H, W] of the network to [N, 3, H', W'] contiguous float32 images in [0, 1]; gradients flow."""
    scaled = _tidy(to_vae(vae, latents).to(vae.dtype))
    framed = hasattr(vae.config, _FRAMED)
    images = vae.decode(scaled.unsqueeze(2) if framed else scaled, return_dict=False)[0]
    images = images[:, :, 0] if framed else images
    return on_white((images.float() / 2 + 0.5).clamp(0, 1)).contiguous()


def encode(vae: Any, images: Tensor) -> Tensor:
    """The inverse of `decode`, [N, 3, H', W'] in [0, 1] to [N, C, H, W] float32: the posterior's mean, never a draw."""
    pixels = _tidy((2 * images - 1).to(vae.device, vae.dtype))
    if getattr(vae.config, "in_channels", None) == _RGBA:
        pixels = torch.nn.functional.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0)  # opaque
    framed = hasattr(vae.config, _FRAMED)
    encoded = vae.encode(pixels.unsqueeze(2) if framed else pixels)
    mean = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    return from_vae(vae, (mean[:, :, 0] if framed else mean).float())


def to_vae(vae: Any, latents: Tensor) -> Tensor:
    """[N, C, H, W] of the network to what the autoencoder decodes, in the order of operations of the stock pipelines.

    FLUX.2's network sees 2 x 2 latents as one, so here [N, 4c, h, w] becomes [N, c, 2h, 2w]; else the shape stays.
    """
    config = vae.config
    if hasattr(vae, "bn"):
        mean, std = _batch_statistics(vae, latents)
        return _unpatchify(latents * std + mean)
    if getattr(config, "latents_mean", None) is not None:
        mean, std = _channel_statistics(config, latents)
        return latents / (1 / std) + mean
    shift = getattr(config, "shift_factor", None) or 0.0
    return latents / config.scaling_factor + shift


def from_vae(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `to_vae`, shapes too."""
    config = vae.config
    if hasattr(vae, "bn"):
        latents = _patchify(latents)
        mean, std = _batch_statistics(vae, latents)
        return (latents - mean) / std
    if getattr(config, "latents_mean", None) is not None:
        mean, std = _channel_statistics(config, latents)
        return (latents - mean) * (1 / std)
    shift = getattr(config, "shift_factor", None) or 0.0
    return (latents - shift) * config.scaling_factor


def on_white(images: Tensor) -> Tensor:
    """[N, 3, H, W] as it is; [N, 4, H, W] (Qwen-Image-2.1's RGBA) as a page shows it, [N, 3, H, W], in [0, 1]."""
    if images.shape[1] != _RGBA:
        return images
    colours, opacity = images[:, :3], images[:, 3:]
    return colours * opacity + (1 - opacity)


def _batch_statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """FLUX.2: running mean and standard deviation of a BatchNorm over channels of 2 x 2 latents."""
    mean, variance = (t.view(1, -1, 1, 1).to(latents) for t in (vae.bn.running_mean, vae.bn.running_var))
    return mean, torch.sqrt(variance + vae.config.batch_norm_eps)


def _channel_statistics(config: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen-Image: a mean and a standard deviation for every channel."""
    mean, std = (
        to_device(torch.tensor(values).view(1, -1, 1, 1).to(latents.dtype), latents.device)
        for values in (config.latents_mean, config.latents_std)
    )
    return mean, std


def _patchify(latents: Tensor) -> Tensor:
    """[N, C, 2h, 2w] -> [N, 4C, h, w]."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def _unpatchify(latents: Tensor) -> Tensor:
    """[N, 4C, h, w] -> [N, C, 2h, 2w]."""
    n, c, h, w = latents.shape
    return latents.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


def _tidy(images: Tensor) -> Tensor:
    """bf16 convolutions are fastest with channels last."""
    fast = images.ndim == 4 and images.dtype == torch.bfloat16
    return images.contiguous(memory_format=torch.channels_last) if fast else images
