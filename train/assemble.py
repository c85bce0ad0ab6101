"""A loaded base becomes what is trained: adapter, places of the weights, recomputation, kernels.

Owns the order of these, for a run and for the benchmarks alike. What each of them does is its own
module's. The base comes loaded, and quantised and cut into parts where that was asked for.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.torch_version import TorchVersion

from train import lora, objective, parallel, randomness, speed
from train.batch import Batch
from train.config import Config, MemoryConfig
from train.errors import ConfigError, MachineError
from train.loading import frozen
from train.loading.transformer import Place
from train.lora import AnyAdapter, eva
from train.memory import offload, recompute
from train.parallel import Sharding

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel


@dataclass(frozen=True)
class Memory:
    """The memory settings in numbers, nothing left to decide."""

    blocks: tuple[int, int]
    """Double and single ones of the base."""
    resident: int
    """Blocks whose weights stay on the GPU."""
    recomputed: frozenset[int]
    """Blocks whose activations are recomputed, numbered through."""
    offload_activations: bool

    @classmethod
    def of(cls, memory: MemoryConfig, *, double: int, single: int) -> "Memory":
        """Of settings without auto. Raises ConfigError for more blocks than there are."""
        assert memory.resident_blocks != "auto"
        assert memory.gradient_checkpointing != "auto"
        blocks = double + single
        resident = blocks if memory.resident_blocks == "all" else memory.resident_blocks
        offload.streamed(double, single, resident=resident)
        recomputed = recompute.chosen(blocks, memory.gradient_checkpointing)
        return cls((double, single), resident, recomputed, memory.offload_activations)

    @property
    def streamed(self) -> list[str]:
        """Names of the blocks whose weights are in RAM."""
        return offload.streamed(*self.blocks, resident=self.resident)

    def place(self, device: torch.device) -> Place:
        """For the loader: streamed blocks' weights never stay on the device."""
        away = tuple(f"{name}." for name in self.streamed)
        return lambda name: torch.device("cpu") if name.startswith(away) else device


@dataclass(frozen=True)
class Assembled:
    """A transformer that is ready to be trained, and the way back."""

    targets: list[str]
    """Modules that the adapter is on."""
    start: AnyAdapter | None
    """What is taken off the adapter: see `lora.with_start`."""
    undo: ExitStack
    """Closing it leaves the base with its adapter and nothing else; do so before unloading that."""


def assemble(
    transformer: "Flux2Transformer2DModel",
    config: Config,
    *,
    memory: Memory,
    device: torch.device,
    dtype: torch.dtype,
    start: AnyAdapter | None = None,
    first: Iterable[Batch] = (),
) -> Assembled:
    """Attach a fresh adapter, then place, recompute and speed up as the config says.

    The order matters: streaming must find the frozen weights under the adapter, recomputation must
    stream again, and what is compiled must be neither's hooks.
    dtype: what the blocks compute in. start: a resumed run's, see `lora.attach`. first: batches
    that EVA starts from, the same in all processes; none where the weights come from a checkpoint.
    Raises UserError where the machine can't do what is asked.
    """
    seed = randomness.derived_seed(config.seed, "lora")
    targets = lora.attach(transformer, config.lora, seed=seed, start=start)
    if config.lora.init == "pissa" or config.lora.kind == "dora":  # GPUs round differently
        parts = [*lora.trainable(transformer), *lora.start_parameters(transformer)]
        parallel.agree(parts, device=device)
    start = lora.read_start(transformer, config.lora)
    undo = ExitStack()
    if memory.streamed:
        offload.attach(transformer, resident=memory.resident, device=device)
    if memory.recomputed:
        offloads = memory.offload_activations
        recompute.enable(
            transformer, memory.recomputed, offload_activations=offloads, device=device
        )
        undo.callback(transformer.disable_gradient_checkpointing)
    if config.lora.init == "eva":
        _start_from_batches(transformer, config, targets, first, device=device, dtype=dtype)
    if config.speed.fp8_matmul:
        frozen.use_fp8_matmul(transformer, device)
    undo.push(speed.apply(transformer, config.speed, device=device, dtype=dtype))
    return Assembled(targets, start, undo)


def check_sharded(sharding: Sharding, config: Config) -> None:
    """Raises ConfigError or MachineError, before anything is encoded, for what a sharded base can't
    have."""
    if sharding == "none":
        return
    if sharding == "fsdp2" and config.base.quantize != "none" and _is_old_torch():
        raise MachineError(
            f"base.quantize: FSDP2 of torch {torch.__version__} can't cut packed weights. Install "
            "torch 2.12 or newer, or launch with configs/accelerate/deepspeed.yaml."
        )
    if config.memory.resident_blocks not in ("all", "auto"):
        raise ConfigError(
            "memory.resident_blocks: a base in parts on each process can't be streamed, too. Write "
            "all, or launch without FSDP or DeepSpeed."
        )
    if config.lora.kind == "dora":
        raise ConfigError(
            "lora.kind: peft can't load DoRA onto a base in parts on each process, so the run "
            "couldn't prove its file. Use lora, or launch with configs/accelerate/ddp.yaml."
        )
    if config.speed.compile and sharding == "zero3":
        raise ConfigError(
            "speed.compile: DeepSpeed gathers each Linear by itself, inside of what would be "
            "compiled. Write false, or launch with configs/accelerate/fsdp2.yaml."
        )


def _is_old_torch() -> bool:
    """Whether FSDP2 takes each part for trainable at first, which bytes can't be."""
    return TorchVersion(torch.__version__) < TorchVersion("2.12")


def _start_from_batches(
    transformer: Any,
    config: Config,
    targets: list[str],
    batches: Iterable[Batch],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """EVA's start, before anything is compiled; nothing for no batches."""
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    guidance = config.flow.guidance if transformer.config.guidance_embeds else None
    with eva.listening(transformer, targets, rank=config.lora.rank):
        for batch in chain([first], batches):
            objective.predict(transformer, batch.to(device), dtype=dtype, guidance=guidance)
    parallel.agree(lora.trainable(transformer), device=device)
