"""Dtype and broadcasting rules that every kernel of this package shares.

Kernels compute in the dtype of their latents when that is float32 or float64 and in float32 when it is a half
precision: a log-ratio of 1e-5 does not survive bfloat16, and a float64 reference must not be rounded on the
way.
"""

import torch
from torch import Tensor

Scalar = float | Tensor
"""A number per batch (float or 0-d tensor) or per sample ([B] tensor)."""


def full_precision(x: Tensor) -> Tensor:
    """Return `x` itself when it is float32 or float64, and a float32 copy of anything else.

    Args:
        x: any shape, any dtype.
    """
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rounding(size: Tensor) -> Tensor:
    """How far apart two numbers of a size may be and still be one number, computed twice: four units in the last place.

    Args:
        size: any shape; the absolute value of the numbers.

    Returns:
        The same shape.
    """
    return 4 * torch.finfo(size.dtype).eps * size


def per_sample(value: Scalar, like: Tensor, *, name: str = "value") -> Tensor:
    """Broadcast a number or a [B] tensor against the trailing axes of a batch.

    A bare [B] next to [B,C,H,W] would broadcast along the *width* without a word, which is the classic silent
    bug here.

    Args:
        value: float, 0-d tensor, [1], [B], or an already aligned tensor with as many axes as `like`.
        like: [B, ...]; gives batch size, number of axes, dtype and device.
        name: what to call the value in an error.

    Returns:
        [B, 1, ..., 1] (or the aligned input) in the dtype of `like`.

    Raises:
        ValueError: for more or fewer numbers than samples.
    """
    if not isinstance(value, Tensor):
        return torch.full((like.shape[0],) + (1,) * (like.ndim - 1), value, dtype=like.dtype, device=like.device)
    value = value.to(device=like.device, dtype=like.dtype)
    if value.ndim == like.ndim and value.ndim > 1:
        check_broadcasts_into(like, **{name: value})
        return value
    if value.ndim > 1 or value.numel() not in (1, like.shape[0]):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, neither a number nor one number for each of the "
            f"{like.shape[0]} samples. Pass a float or a [{like.shape[0]}] tensor."
        )
    return value.reshape((-1,) + (1,) * (like.ndim - 1)).expand((like.shape[0],) + (1,) * (like.ndim - 1))


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have one shape: broadcasting latents is always a mistake."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"latent shapes differ: {shapes}. All of them must be the same [B, C, H, W].")


def check_broadcasts_into(target: Tensor, **others: Scalar) -> None:
    """Raise ValueError if a tensor would expand `target`; credit broadcasts into a loss only."""
    for name, other in others.items():
        if not isinstance(other, Tensor):
            continue
        aligned = zip(reversed(other.shape), reversed(target.shape), strict=False)
        if other.ndim > target.ndim or any(size not in (1, wanted) for size, wanted in aligned):
            raise ValueError(
                f"{name} of shape {tuple(other.shape)} would expand the loss of shape {tuple(target.shape)}. Credit "
                f"broadcasts into the loss, never the other way: reshape {name}, for example to [B, 1, 1]."
            )
