"""Patch features of images, for credit that follows what stands out and for measures of diversity."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import interpolate

PARAMETERS: Final = {"vit_base_patch14_reg4_dinov2.lvd142m": 86_582_016, "vit_small_patch16_224.dino": 21_665_664}
"""Models of timm -> parameters, as timm builds them; another resolution has a few position embeddings fewer."""


def bytes_of(model: str) -> int | None:
    """Memory of a model's float32 weights; None where nobody knows before it is loaded."""
    if (file := Path(model) / "model.safetensors").is_file():
        return file.stat().st_size
    return 4 * PARAMETERS[model] if model in PARAMETERS else None


@functools.lru_cache(maxsize=2)
def _load(model: str, resolution: int, device: str) -> tuple[Any, Tensor, Tensor]:
    """A frozen transformer, and the mean and standard deviation [3, 1, 1] of the images it knows."""
    import timm

    name = f"local-dir:{model}" if Path(model).is_dir() else model
    file = _safetensors(model)
    overlay = None if Path(model).is_dir() else {"file": str(file)}
    network = timm.create_model(
        name, pretrained=True, num_classes=0, img_size=resolution, pretrained_cfg_overlay=overlay
    )
    network = network.eval().requires_grad_(False).to(device)
    config: dict[str, Any] = network.pretrained_cfg
    mean, std = (torch.tensor(config[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    return network, mean, std


def _safetensors(model: str) -> Path:
    """The weights of a model of timm; timm itself would also take pickled ones, which can run any code."""
    if Path(model).is_dir():
        file = Path(model) / "model.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"model={model!r}: {file} is missing; weights are read from safetensors alone.")
        return file
    import timm
    from huggingface_hub import hf_hub_download

    config = timm.models.get_pretrained_cfg(model, allow_unregistered=False)
    if not config.hf_hub_id:
        raise ValueError(f"model={model!r}: timm knows no repository of the hub with its weights. Choose another one.")
    try:
        return Path(hf_hub_download(config.hf_hub_id, "model.safetensors"))
    except OSError as error:
        raise FileNotFoundError(
            f"model={model!r}: {config.hf_hub_id}/model.safetensors cannot be fetched ({error}). Fetch it where there "
            f"is a network (hf download {config.hf_hub_id}) and give the folder."
        ) from error


def patch_features(images: Tensor, model: str, resolution: int = 224) -> Tensor:
    """[N, 3, H, W] uint8 images -> [N, h, w, D] tokens of a frozen transformer, class and register tokens left out.

    Args:
        model: a vision transformer's name in timm, or a folder with one (config.json and model.safetensors).
        resolution: pixels a side of what it sees; a multiple of its patch size.

    Raises:
        ValueError: when the model has no patch tokens.
    """
    network, mean, std = _load(model, resolution, str(images.device))
    observed = interpolate(
        images.float() / 255, size=(resolution, resolution), mode="bicubic", align_corners=False, antialias=True
    ).clamp(0, 1)
    with torch.no_grad():
        tokens = network.forward_features((observed - mean) / std)
    if tokens.ndim != 3 or not hasattr(network, "patch_embed"):
        raise ValueError(f"model={model!r}: no patch tokens. Use a plain vision transformer.")
    return tokens[:, network.num_prefix_tokens :].unflatten(1, tuple(network.patch_embed.grid_size))
