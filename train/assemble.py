"""A loaded base becomes what is trained: adapter, places of the weights, recomputation, kernels.

Owns the order of these, for a run and for the benchmarks alike. What each of them does is its own
module's. The base comes loaded, and quantised where the config says so.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from train import lora, randomness, speed
from train.config import Config, MemoryConfig
from train.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel


@dataclass(frozen=True)
class Assembled:
    """A transformer that is ready to be trained, and the way back."""

    targets: list[str]
    """Modules that the adapter is on."""
    undo: ExitStack
    """Closing it leaves the base with its adapter and nothing else; do so before unloading that."""


def assemble(
    transformer: "Flux2Transformer2DModel",
    config: Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Assembled:
    """Attach a fresh adapter, then place, recompute and speed up as the config says.

    The order matters: streaming must find the frozen weights under the adapter, recomputation must
    stream again, and what is compiled must be neither's hooks.
    dtype: what the blocks compute in. Raises UserError where the machine can't do what is asked.
    """
    targets = lora.attach(
        transformer, config.lora, seed=randomness.derived_seed(config.seed, "lora")
    )
    undo = ExitStack()
    _place(transformer, config.memory)
    _recompute(transformer, config.memory, undo=undo)
    undo.push(speed.apply(transformer, config.speed, device=device, dtype=dtype))
    return Assembled(targets, undo)


def _place(transformer: "Flux2Transformer2DModel", memory: MemoryConfig) -> None:
    """Blocks that don't stay on the GPU are streamed in."""
    if memory.resident_blocks != "all":
        raise ConfigError("memory.resident_blocks: only 'all' works yet")


def _recompute(
    transformer: "Flux2Transformer2DModel", memory: MemoryConfig, *, undo: ExitStack
) -> None:
    """Blocks whose activations aren't kept."""
    if memory.gradient_checkpointing == "none":
        return
    if memory.gradient_checkpointing != "all" or memory.offload_activations:
        raise ConfigError("memory: only gradient_checkpointing 'all' or 'none' works yet")
    transformer.enable_gradient_checkpointing()
    undo.callback(transformer.disable_gradient_checkpointing)
