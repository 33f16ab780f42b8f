"""Noise schedules: which sigmas a rollout visits and which ones a forward-process loss is trained at.

All schedules decrease, start at 1 (pure noise) and are float32, as diffusers' are; the network's timestep is
1000 sigma.
"""

from typing import overload

import torch
from torch import Tensor


@overload
def shift_sigma(u: Tensor, shift: float) -> Tensor: ...
@overload
def shift_sigma(u: float, shift: float) -> float: ...
def shift_sigma(u: Tensor | float, shift: float) -> Tensor | float:
    """Move times towards noise, sigma = shift u / (1 + (shift - 1) u) (SD3, arXiv 2403.03206, eq. 23).

    Args:
        u: times in [0, 1], any shape.
        shift: positive; 3 for SD3 at 1024 px, 1 changes nothing, below 1 moves towards the image.

    Returns:
        The same shape; 0 and 1 stay fixed.
    """
    _check_shift(shift)
    return shift * u / (1 + (shift - 1) * u)


def sd3_sigmas(num_steps: int, *, shift: float = 3.0, num_train_timesteps: int = 1000) -> Tensor:
    """The schedule of diffusers' FlowMatchEulerDiscreteScheduler after `set_timesteps(num_steps)`.

        sigma_i = shift( linspace(1, shift(1 / num_train_timesteps), N)[i] ) for i < N,   sigma_N = 0

    The lower end is shifted *twice* (the scheduler stores it shifted once already), so the last non-zero
    sigma is tiny (.0089 for shift 3) and the step before it is huge.

    Args:
        num_steps: N >= 1.
        shift: as in `shift_sigma`.
        num_train_timesteps: 1000 for every public model.

    Returns:
        [N + 1] float32.
    """
    _check_num_steps(num_steps)
    lowest = shift_sigma(1 / num_train_timesteps, shift)
    base = torch.linspace(1.0, lowest, num_steps, dtype=torch.float64)
    return torch.cat([shift_sigma(base, shift), base.new_zeros(1)]).float()


def even_sigmas(num_steps: int) -> Tensor:
    """Equal steps, sigma = linspace(1, 0, N + 1): for tests, and for models trained without a shift.

    Args:
        num_steps: N >= 1.

    Returns:
        [N + 1] float32, from 1 to 0.
    """
    _check_num_steps(num_steps)
    return torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64).float()


def _check_num_steps(value: int, name: str = "num_steps") -> None:
    if value < 1:
        raise ValueError(f"{name}={value}: a schedule needs at least one step. Use {name} >= 1.")


def _check_shift(shift: float) -> None:
    if shift <= 0:
        raise ValueError(f"shift={shift}: the shift is a positive factor. Use 3.0 for SD3, 1.0 for no shift.")
