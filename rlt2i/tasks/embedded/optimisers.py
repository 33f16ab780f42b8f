"""The two optimisers of pretraining, with states that are flat dicts of tensors: nothing is pickled."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class Muon:
    """Momentum orthogonalised by Newton-Schulz iterations, for the matrices of the transformer blocks.

    Matrices of one shape are updated in one batched product. An update has the root-mean-square of an AdamW
    update (0.2), so both optimisers share a learning rate. The same algorithm as `torch.optim.Muon` with
    adjust_lr_fn="match_rms_adamw", which multiplies matrix by matrix in bfloat16: on a CPU it needs 1.8 s for a step of
    32 matrices that takes 0.15 s here.
    """

    def __init__(self, parameters: Iterable[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        self._groups = list(by_shape.values())
        self._momenta = [torch.zeros(len(group), *group[0].shape) for group in self._groups]
        self._momentum = momentum
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter from its gradient."""
        for group, buffer in zip(self._groups, self._momenta, strict=True):
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            buffer.lerp_(gradient, 1 - self._momentum)
            update = orthogonalise(gradient.lerp(buffer, self._momentum))
            size = learning_rate * 0.2 * math.sqrt(max(group[0].shape))
            torch._foreach_mul_(group, 1 - learning_rate * self._weight_decay)
            torch._foreach_sub_(group, list((update * size).unbind()))

    def state(self) -> dict[str, Tensor]:
        """Tensors from which `load_state` continues."""
        return {f"muon.{i}": buffer for i, buffer in enumerate(self._momenta)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        for i, buffer in enumerate(self._momenta):
            buffer.copy_(state[f"muon.{i}"])


def orthogonalise(matrices: Tensor) -> Tensor:
    """[N, a, b] -> [N, a, b] with the same singular vectors and singular values near one (Muon's quintic)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * (gram @ gram) - 4.7750 * gram) @ x
    return x.mT if tall else x


class Adam:
    """AdamW without weight decay, whose state is a flat dict of tensors."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._optimizer = torch.optim.AdamW(list(parameters), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def step(self, learning_rate: float) -> None:
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        slots = self._optimizer.state_dict()["state"]
        return {f"adam.{i}.{name}": tensor for i, slot in slots.items() for name, tensor in slot.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            if key.startswith("adam."):
                _, i, name = key.split(".")
                slots.setdefault(int(i), {})[name] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": slots})
