"""Adapters on the transformer's block Linears: attaching them, reading them back, measuring them.

LoRA, DoRA and LoKr are peft's, in fp32 whatever the base's type. What goes on which module is
`targets`', the layers are `layers`', adapters in memory are `adapter`'s; files are `export`'s and
`checkpoint`'s.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from train.config import LoraConfig
from train.errors import CheckpointError
from train.lora import branch, layers, pissa
from train.lora.adapter import Adapter, AnyAdapter, LokrAdapter, of_parts, with_start
from train.lora.layers import NAME as ADAPTER_NAME
from train.lora.pissa import START_NAME, start_parameters
from train.lora.targets import BLOCK_LINEAR, block_kind, block_linears, select_targets

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel

__all__ = [
    "ADAPTER_NAME",
    "BLOCK_LINEAR",
    "Adapter",
    "AnyAdapter",
    "LokrAdapter",
    "attach",
    "block_kind",
    "block_linears",
    "disabled",
    "gradient_norms",
    "read",
    "read_start",
    "select_targets",
    "start_parameters",
    "trainable",
    "trainable_up",
    "update_norms",
    "with_start",
    "write",
]


def attach(
    transformer: "Flux2Transformer2DModel",
    lora: LoraConfig,
    *,
    seed: int,
    start: AnyAdapter | None = None,
) -> list[str]:
    """Freeze the base, add a fresh adapter in fp32 (its update is zero) and return its modules.

    start: a resumed run's `read_start`, in place of finding it anew. Raises ConfigError where the
    base has no weights that PiSSA or DoRA can start from, or that LoKr can't divide.
    """
    targets = select_targets(transformer, lora.targets)
    transformer.requires_grad_(False)
    own = {p.device for p in transformer.parameters() if p.is_cuda}
    with torch.random.fork_rng(own):  # else of all GPUs that the machine has, with a warning
        torch.manual_seed(seed)
        layers.add(transformer, lora, targets, dropout=lora.dropout)
        if lora.init == "pissa":
            pissa.add_start(transformer, lora, targets)
            if start is None:
                pissa.start_from_base(transformer, targets, scale=lora.scale)
            else:
                write(transformer, start, adapter=START_NAME)
    found = {module for part in layers.parts(transformer).values() for module in part}
    assert found == set(targets), f"peft adapted {found ^ set(targets)} otherwise than asked"
    if lora.kind == "lora" and lora.compute == "base":
        branch.use(transformer)
    return targets


def trainable(transformer: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters, in model order."""
    return [p for p in transformer.parameters() if p.requires_grad]


def trainable_up(transformer: nn.Module) -> list[nn.Parameter]:
    """Those of them that are up matrices (lora_B)."""
    return list(layers.parts(transformer).get("lora_B", {}).values())


def read(transformer: nn.Module, lora: LoraConfig, *, adapter: str = ADAPTER_NAME) -> AnyAdapter:
    """A copy of the attached adapter on the CPU."""
    parts = {
        part: {module: w.detach().float().cpu().clone() for module, w in parameters.items()}
        for part, parameters in layers.parts(transformer, name=adapter).items()
    }
    return of_parts(parts, rank=lora.rank, alpha=lora.scale * lora.rank)


@torch.no_grad()
def write(transformer: nn.Module, source: AnyAdapter, *, adapter: str = ADAPTER_NAME) -> None:
    """Put an adapter's weights into the attached one. Raises CheckpointError if they don't fit."""
    slots, weights = (
        {(part, module): tensor for part, some in parts.items() for module, tensor in some.items()}
        for parts in (layers.parts(transformer, name=adapter), source.parts)
    )
    differing = sorted(slots.keys() ^ weights.keys())
    misfits = [n for n in slots.keys() & weights.keys() if slots[n].shape != weights[n].shape]
    if wrong := differing + misfits:
        raise CheckpointError(
            f"the adapter has other modules or ranks than this config: {wrong[0][1]} "
            f"and {len(wrong) - 1} more differ. "
            "Resume with the config of the run, or start a run of another name."
        )
    for name, slot in slots.items():
        slot.copy_(weights[name])


def read_start(transformer: nn.Module, lora: LoraConfig) -> AnyAdapter | None:
    """A copy of what is taken off the adapter, on the CPU; None where that is nothing.

    Frozen as it is, it is streamed with the base: to be read before that begins.
    """
    return read(transformer, lora, adapter=START_NAME) if lora.init == "pissa" else None


@contextmanager
def disabled(transformer: "Flux2Transformer2DModel") -> Iterator[None]:
    """The base alone, while this lasts. What is trained is so again after it."""
    before = [(parameter, parameter.requires_grad) for parameter in transformer.parameters()]
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
        for parameter, trained in before:  # peft takes every active adapter for trained
            parameter.requires_grad_(trained)


def update_norms(transformer: nn.Module) -> dict[str, Tensor]:
    """Frobenius norm of the update by kind of block, on the device; no host waits for it.

    DoRA's is that of its directions' update, without the magnitudes.
    """
    squares: dict[str, list[Tensor]] = {}
    for name, module in transformer.named_modules():
        square = layers.squared_norm(module)
        if square is not None:
            squares.setdefault(block_kind(name), []).append(square)
    return {
        kind: torch.stack(some).sum().clamp(min=0).sqrt() for kind, some in sorted(squares.items())
    }


@torch.no_grad()
def gradient_norms(transformer: nn.Module) -> dict[str, Tensor]:
    """Norm of the gradient by kind of block, on the device."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in transformer.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(block_kind(name), []).append(parameter.grad)
    return {kind: nn.utils.get_total_norm(some) for kind, some in sorted(groups.items())}
