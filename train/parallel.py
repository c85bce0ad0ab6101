"""Several processes on one adapter: gradients added up, and the frozen base in parts on each.

The adapter is small and whole everywhere, so all that processes exchange of it is one sum of its
gradients a step; torch's DDP would send the frozen base at its start, too. The base may be sharded
by torch's FSDP2: each process keeps a part of every block and gathers the rest while the block is
in use. Frozen weights have no gradients, so that is all FSDP2 does here, for any type of weights.
DeepSpeed does the same by `zero3`. What is launched where is accelerate's.
"""

from collections.abc import Sequence
from typing import Any, Literal

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
            "device, with plain data parallelism, FSDP2 or DeepSpeed. configs/accelerate/ has a file "
            "for each: accelerate launch --config_file configs/accelerate/ddp.yaml train.py ..."
        )
    plugin = found.state.fsdp_plugin if sharding(found) == "fsdp2" else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise ConfigError(
            "accelerate is configured for FSDP version 1; Kindling needs version 2: "
            "accelerate launch --config_file configs/accelerate/fsdp2.yaml train.py ..."
        )
    return found


def sharding(accelerator: Accelerator) -> Sharding:
    """By which engine each process holds only a part of the base, if so."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "zero3" if zero3.is_launched() else "none"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of the base."""
    return sharding(accelerator) != "none"


def shard(
    transformer: Any,
    engine: Sharding,
    *,
    trainable: Sequence[nn.Parameter],
    device: torch.device,
) -> None:
    """Keep a part of each frozen weight on each process; `trainable` ones stay whole, on `device`.

    The model may lie in RAM: a block goes to the device by itself before it is cut. Outputs and
    gradients stay what they were, to the bit. From here on all processes must call the model
    together, previews included.
    """
    if engine == "zero3":
        zero3.shard(transformer, device)
        return
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    whole = set(trainable)
    for parameter in trainable:
        parameter.data = parameter.data.to(device)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for module in [*blocks, transformer]:
        own = {parameter for parameter in module.parameters() if parameter in whole}
        fully_shard(module, mesh=mesh, ignored_params=own)


def describe(transformer: nn.Module, engine: Sharding) -> str:
    """How much of the base is here, for the console."""
    frozen = [p for p in transformer.parameters() if not p.requires_grad]
    parts = [p.to_local() if isinstance(p, DTensor) else zero3.own_part(p) for p in frozen]
    own, whole = sum(p.nbytes for p in parts), sum(zero3.whole_size(p) for p in frozen)
    return f"base in parts ({engine}): {own / 1e9:.3g} of {whole / 1e9:.3g} GB on each process"


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
