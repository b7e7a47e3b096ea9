"""How a model lies on the processes: whole on each (DDP), or sharded over them (FSDP2).

    none      every process holds everything; gradients are averaged
    full      every tensor is cut over all processes; a block is gathered when it runs
    hybrid    cut within groups of `shard_size` processes (by default, those of a machine), which
              are copies of each other

Sharding uses PyTorch's `fully_shard`, one unit per block of the prior and one for the rest:
weights, gradients, optimizer state and averages are then all cut the same way. Under bf16, blocks
are gathered in bfloat16 and gradients are summed in float32; norms, softmax and losses compute in
float32 in any case (`unified.model.layers`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from unified.config.schema import TrainingConfig
from unified.model.prior import Block

if TYPE_CHECKING:
    from accelerate import Accelerator


def distributed_settings() -> list[Any]:
    """How processes must average gradients, for ``Accelerator(kwargs_handlers=...)``: a step may
    leave out parameters, as when the autoencoders rest."""
    from accelerate.utils import DistributedDataParallelKwargs

    return [DistributedDataParallelKwargs(find_unused_parameters=True)]


def distribute(model: nn.Module, accelerator: Accelerator, config: TrainingConfig) -> nn.Module:
    """`model` as the loop calls it. ValueError for a sharding that these processes cannot have."""
    if config.sharding == "none":
        return accelerator.prepare_model(model)
    shard(model, config, accelerator.device.type, accelerator.mixed_precision == "bf16")
    return model


def shard(model: nn.Module, config: TrainingConfig, device: str, bf16: bool) -> None:
    """Cut the parameters of `model` over the processes, in place."""
    mesh = init_device_mesh(device, **mesh_shape(config, dist.get_world_size()))
    gathered = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in list(model.modules()):
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=gathered)
    # resharded after every forward: what validation gathers must not outlive it
    fully_shard(model, mesh=mesh, mp_policy=whole, reshard_after_forward=True)
    plain = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if plain or mesh.size() != dist.get_world_size():
        raise ValueError(
            f"the model was not sharded over {dist.get_world_size()} processes:"
            f" {plain[0] if plain else mesh} is not"
        )


def mesh_shape(config: TrainingConfig, world: int) -> dict[str, Any]:
    """Arguments of the device mesh. ValueError for groups that do not divide the processes."""
    if config.sharding == "full":
        return {"mesh_shape": (world,), "mesh_dim_names": ("shard",)}
    size = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % size:
        raise ValueError(
            f"training.shard_size is {size}, which does not divide the {world} processes; hybrid"
            " sharding needs groups of one size"
        )
    return {"mesh_shape": (world // size, size), "mesh_dim_names": ("replicate", "shard")}


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def apart(model: nn.Module) -> AbstractContextManager[Any]:
    """Within it, gradients of replicas stay on their process and add up there. Those of a sharded
    model are divided after every microbatch all the same: kept, they would be as large as it is."""
    no_sync = getattr(model, "no_sync", nullcontext)
    return no_sync()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it, parts of a sharded model can be called by themselves (its blocks gather when they
    run, the rest is gathered here). Every process has to call the same."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def clip(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients down to norm `most`; the norm before, over all processes. Nothing waits
    for it."""
    norm = nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def summed(numbers: Tensor, accelerator: Accelerator) -> Tensor:
    """`numbers` added up over the processes."""
    if accelerator.num_processes > 1:
        dist.all_reduce(numbers)
    return numbers


def over_ranks(values: Sequence[float], accelerator: Accelerator) -> list[float]:
    """`values` added up over the processes, and waited for."""
    if accelerator.num_processes == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return [float(value) for value in summed(numbers, accelerator).tolist()]


def from_main(value: Any) -> Any:
    """The main process's `value`, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
