"""The noise levels of a pipeline, from its own scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def scheduler_levels(
    scheduler: Any, num_steps: int, *, mu: float | None, levels: Sequence[float] | None, path: str
) -> Tensor:
    """[T + 1] float32 on the host.

    Args:
        mu: logarithm of the shift, where the scheduler shifts by image size.
        levels: before the shift, without the last; evenly many by default.
        path: of the pipeline, for the message.

    Raises:
        ValueError: for so few steps that the scheduler has no levels.
    """
    if mu is None:
        scheduler.set_timesteps(num_steps)
    else:
        even = np.linspace(1.0, 1 / num_steps, num_steps)
        scheduler.set_timesteps(sigmas=even if levels is None else list(levels), mu=mu)
    sigmas = torch.as_tensor(scheduler.sigmas, dtype=torch.float32).cpu().clone()
    if not torch.isfinite(sigmas).all():  # one that stretches its levels to a last one divides by zero
        raise ValueError(
            f"num_steps={num_steps}: the {type(scheduler).__name__} of {path} has no levels for so few. Use 2 or more."
        )
    return sigmas


def shift_of(scheduler: Any, num_tokens: int) -> float:
    """mu, linear in the number of image tokens (FLUX.1)."""
    config = scheduler.config
    start, end = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (end - start)
    return float(num_tokens * slope + (low - slope * start))
