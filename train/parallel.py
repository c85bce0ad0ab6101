"""Several processes on one adapter: gradients added up, and the frozen base in parts on each.

The adapter is small and whole everywhere, so all that processes exchange of it is one sum of its
gradients a step; torch's DDP would send the frozen base at its start, too. The base may be sharded
by torch's FSDP2: each process keeps a part of every block and gathers the rest while the block is
in use. Frozen weights have no gradients, so that is all FSDP2 does here, for any type of weights.
DeepSpeed does the same by `zero3`. The base is cut while it is loaded and the adapter comes onto
what is cut, so neither engine ever sees that. What is launched where is accelerate's.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from train import zero3
from train.errors import ConfigError

ENGINES = (
    *(DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU),
    *(DistributedType.FSDP, DistributedType.DEEPSPEED),
)

Sharding = Literal["none", "fsdp2", "zero3"]
"""What keeps the base in parts, if anything does."""


def accelerator() -> Accelerator:
    """accelerate's view of the processes; of its settings nothing else counts.

    Raises ConfigError for settings that would change training, and for engines without a use here.
    """
    if zero3.is_launched():
        zero3.check()
    found = Accelerator(mixed_precision="no")  # base.dtype decides, not a launcher's default
    if found.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"accelerate's gradient_accumulation_steps is {found.gradient_accumulation_steps}: set "
            "train.accumulate instead, and launch without --gradient_accumulation_steps"
        )
    if found.distributed_type not in ENGINES:
        raise ConfigError(
            f"accelerate is configured for {found.distributed_type.value}; Kindling trains on one "
            "device, with plain data parallelism, FSDP2 or DeepSpeed. There is a file for each: "
            "accelerate launch --config_file configs/accelerate/ddp.yaml train.py ..."
        )
    if sharding() == "fsdp2" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "accelerate is configured for FSDP version 1; Kindling needs version 2: "
            "accelerate launch --config_file configs/accelerate/fsdp2.yaml train.py ..."
        )
    return found


def sharding() -> Sharding:
    """By which engine each process holds only a part of the base, if so.

    What accelerate's launcher has set: accelerate itself forgets both engines on CPUs.
    """
    if zero3.is_launched():
        return "zero3"
    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else "none"


def is_sharded() -> bool:
    """Whether each process holds only a part of the base."""
    return sharding() != "none"


def cutter(engine: Sharding, device: torch.device) -> Callable[[nn.Module], object] | None:
    """What leaves each process its part of a module's weights, on `device`; None to cut nothing.

    To be called with each block, in the same order on all processes, and then with the model.
    Outputs and gradients stay what they were, to the bit. From then on all processes must call the
    model together, previews included.
    """
    if engine == "none":
        return None
    if engine == "zero3":
        return zero3.cut
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    return partial(fully_shard, mesh=mesh)


def least(value: int, *, device: torch.device) -> int:
    """The smallest of all processes' values, so that all decide alike."""
    values = torch.tensor(value, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return int(values.item())


def describe(transformer: nn.Module, engine: Sharding) -> str:
    """How much of the base is here, for the console."""
    frozen = [p for p in transformer.parameters() if not p.requires_grad]
    own, whole = sum(own_part(p).nbytes for p in frozen), sum(zero3.whole_size(p) for p in frozen)
    return f"base in parts ({engine}): {own / 1e9:.3g} of {whole / 1e9:.3g} GB on each process"


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """What this process keeps of a weight; all of it, if it isn't sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else zero3.own_part(weight)


@torch.no_grad()
def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes, in one exchange."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert len(gradients) == len(parameters), "all of the adapter takes part in every step"
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    parts = together.split([gradient.numel() for gradient in gradients])
    whole = [part.view_as(old) for part, old in zip(parts, gradients, strict=True)]
    torch._foreach_copy_(gradients, whole)


@torch.no_grad()
def agree(parameters: Sequence[nn.Parameter], *, device: torch.device) -> None:
    """Let all processes have the first one's values, wherever each keeps them."""
    if dist.is_initialized():
        for parameter in parameters:
            value = parameter.detach().to(device, copy=True)
            dist.broadcast(value, src=0)
            parameter.copy_(value)
