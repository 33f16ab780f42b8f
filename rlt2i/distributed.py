"""This process among the others: a thin layer over accelerate, and no cost at all where there is only one."""

from __future__ import annotations

import torch
from torch import Tensor


class Processes:
    """Rank, device and the few collectives that training needs.

    Launch several with `accelerate launch` or `torchrun`; gradients are summed once per optimiser step, whatever the
    number of backward passes, because the losses of all processes are shares of one mean.
    """

    def __init__(self) -> None:
        from accelerate import Accelerator

        self._accelerator = Accelerator()

    @property
    def rank(self) -> int:
        return self._accelerator.process_index

    @property
    def world_size(self) -> int:
        return self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self._accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()

    def gather(self, tensor: Tensor) -> Tensor:
        """[B, ...] of every process, concatenated in the order of ranks; B must be the same everywhere."""
        if self.world_size == 1:
            return tensor
        if tensor.dtype is torch.bool:
            return self._accelerator.gather(tensor.to(torch.uint8)).bool()
        return self._accelerator.gather(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, element by element."""
        return tensor if self.world_size == 1 else self._accelerator.reduce(tensor, reduction="sum")

    def mean(self, values: Tensor) -> float:
        """Mean over the finite elements of all processes; nan where there are none."""
        kept = values[torch.isfinite(values)].double()
        total = self.sum(
            torch.stack([kept.sum(), torch.tensor(float(kept.numel()), dtype=torch.float64, device=kept.device)])
        )
        return float(total[0] / total[1]) if total[1] > 0 else float("nan")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return flag if self.world_size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)
