"""Full fine-tuning beyond one device: FSDP2 over the blocks of a network, and what a run must know of it.

Each process holds a part of every weight in float32, of its gradient, its optimiser state and its copies in the
parameter sets; a block is gathered, in the precision of the computation, while it computes. Adapters need none of it:
their weights are small, and what is frozen is held in bfloat16.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from rlt2i.distributed import Distributed
from rlt2i.functional.shards import is_sharded
from rlt2i.interfaces import Policy
from rlt2i.parameter_sets import ParameterSets
from rlt2i.policies.guidance import Guided
from rlt2i.policies.pretrained import PretrainedPolicy, PretrainedSpec
from rlt2i.policies.pretrained.export import rebuilt
from rlt2i.recipes.recipe import Recipe
from rlt2i.runs.checkpoint import CheckpointError, shard_folder
from rlt2i.runs.files import advice
from rlt2i.runs.shard_files import write_shards
from rlt2i.training.lockstep import Lockstep


def check_sharding(recipe: Recipe, *, world_size: int | None) -> None:
    """Refuse what cannot be sharded, or should not be.

    Args:
        world_size: number of processes; None for a plan, of whose machines nothing is known.

    Raises:
        ValueError: with the better choice.
    """
    kind, policy = recipe.train.sharding, recipe.policy
    if kind == "none":
        return
    said = f"train.sharding={kind}"
    if not isinstance(policy, PretrainedSpec):
        raise ValueError(f"{said}: {type(policy).__name__} is no pipeline of diffusers. Use train.sharding=none.")
    if policy.lora_rank is not None:
        raise ValueError(
            f"{said} with adapters (policy.lora_rank={policy.lora_rank}): what learns is small, so plain data parallel "
            "is faster and takes hardly more memory. Use train.sharding=none, or policy.lora_rank=null to train the "
            "whole network."
        )
    if kind == "hybrid" and world_size is not None and world_size > 1:
        machines(world_size)


def machines(world_size: int) -> tuple[int, int]:
    """How many machines there are, and processes on each, as the launcher says.

    Raises:
        ValueError: when they cannot be cut into several equal parts.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if here < 2 or world_size % here or world_size == here:
        raise ValueError(
            f"train.sharding=hybrid: {world_size} processes, {here} on this machine. It needs several machines of "
            "equally many processes each, at least two: parts lie within a machine, copies across machines. Use "
            "train.sharding=full."
        )
    return world_size // here, here


@attrs.frozen(kw_only=True, eq=False)
class Sharding:
    """A policy whose network is spread over processes.

    Attributes:
        policy: the pipeline behind it.
        distributed: this process among the others.
    """

    policy: PretrainedPolicy
    distributed: Distributed

    @classmethod
    def of(cls, policy: Policy, kind: str, distributed: Distributed) -> Sharding | None:
        """Cut the network of a policy, in place; None where there is nothing to cut or only one process."""
        if kind == "none" or distributed.world_size == 1:
            return None
        inner = policy.policy if isinstance(policy, Guided) else policy
        assert isinstance(inner, PretrainedPolicy), "checked before loading"
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # a second, which others save

        mesh = _mesh(kind, distributed)
        compute = inner.spec.compute_dtype
        # Inputs are left alone: rounded to bfloat16, noise levels would run together. Autocast does what is needed.
        precision = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for module in (*inner.units(), inner.network):
            _compile_within(module)
            fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # losses are shares of one mean: their gradients add up
            module.set_force_sum_reduction_for_comms(True)
        return cls(policy=inner, distributed=distributed)

    def watch(self, sets: ParameterSets) -> None:
        """Keep the processes in step from here on, under the parameter sets of the run."""
        from torch.distributed import new_group

        lockstep = Lockstep(
            network=self.policy.network,
            sets=sets,
            distributed=self.distributed,
            group=new_group(backend="gloo", timeout=self.distributed.wait_at_most),
            precision=self.policy.precision,
        )
        lockstep.watch()

    def save(
        self,
        run_dir: Path,
        iteration: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        *,
        shipped: AbstractContextManager[None],
        write: Callable[[Path], None],
    ) -> None:
        """Every process writes its own part of a checkpoint, then the first one what is whole. Collective.

        Args:
            tensors: file name -> name -> DTensor, or plain tensor that is the same everywhere.
            shipped: puts the weights in force that are exported.
            write: makes a checkpoint from the folder of parts, while the policy holds its network in one piece.
        """
        doing, world = "writing the checkpoint", self.distributed
        number = world.gather(torch.tensor([os.getpid()], device=world.device))
        folder = shard_folder(run_dir, iteration, int(number[0]))
        try:
            world.raise_on_all(lambda: folder.mkdir(parents=True) if world.is_main else None, doing)
            world.raise_on_all(lambda: _written(folder, tensors), doing)
            with shipped:
                state = self._gathered()
            world.raise_on_all(lambda: self._finish(state, folder, write) if world.is_main else None, doing)
        finally:
            if world.is_main:
                shutil.rmtree(folder, ignore_errors=True)

    def _finish(self, state: dict[str, Tensor], folder: Path, write: Callable[[Path], None]) -> None:
        """Write while the policy holds a network in host memory with this state."""
        pipe, name, network = self.policy.pipe, self.policy.spec.network, self.policy.network
        setattr(pipe, name, rebuilt(network, state))
        try:
            write(folder)
        finally:
            setattr(pipe, name, network)

    @torch.no_grad()
    def _gathered(self) -> dict[str, Tensor]:
        """The state of the network in host memory, whole, on the first process; empty on the others. Collective."""
        state: dict[str, Tensor] = {}
        self.distributed.before_collective()
        for name, tensor in self.policy.network.state_dict().items():
            with self.distributed.together():
                whole = tensor.full_tensor() if is_sharded(tensor) else tensor
            if self.distributed.is_main:
                state[name] = whole.detach().to("cpu", copy=True)
        return state


def _written(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    try:
        write_shards(folder, tensors)
    except OSError as error:
        raise CheckpointError(f"{folder}: could not write shards ({error}). {advice(error, folder)}") from error


def _mesh(kind: str, distributed: Distributed) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if kind == "full":
        return init_device_mesh(distributed.device.type, (distributed.world_size,), mesh_dim_names=("part",))
    return init_device_mesh(distributed.device.type, machines(distributed.world_size), mesh_dim_names=("copy", "part"))


def _compile_within(module: torch.nn.Module) -> None:
    """Compile the forward pass of a compiled module and leave its hooks, by which FSDP gathers, out of the graph."""
    if module._compiled_call_impl is not None:
        module._compiled_call_impl = None
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)
