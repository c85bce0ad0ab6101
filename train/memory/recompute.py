"""Gradient checkpointing: which blocks are recomputed in the backward, and where their inputs wait.

Owns the choice by number, torch's non-reentrant checkpointing of the chosen blocks, and the parking
of what they start from in RAM. How many blocks fit a budget is decided elsewhere. Blocks are
numbered through: the double ones, then the single ones.
"""

import weakref
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from train.errors import ConfigError
from train.memory import transfer
from train.memory.transfer import HostMemory, Lane

REMEDY = "set memory.offload_activations: false"


def chosen(blocks: int, setting: Literal["all", "none"] | int) -> frozenset[int]:
    """The blocks that `memory.gradient_checkpointing` means; a number n is the first of every n.

    Of every full n, so that the last block isn't among them: see `spread`.
    Raises ConfigError if n is more than there are.
    """
    if setting == "none":
        return frozenset()
    every = 1 if setting == "all" else setting
    if every > blocks:
        raise ConfigError(
            f"memory.gradient_checkpointing: every {every}th of {blocks} blocks is none; "
            "write none, or a smaller number"
        )
    return frozenset(range(0, blocks - every + 1, every))


def spread(blocks: int, count: int) -> frozenset[int]:
    """`count` blocks, evenly spread, the last only if it is all.

    Memory peaks at the end of the forward, and to recompute the last block there would add its
    activations to all those that were kept.
    """
    assert 0 <= count <= blocks, f"{count} of {blocks} blocks"
    return frozenset(number * blocks // count for number in range(count))


def enable(
    transformer: Any,
    blocks: Collection[int],
    *,
    offload_activations: bool,
    device: torch.device,
    lane: Lane | None = None,
) -> None:
    """Recompute the blocks of these numbers from now on, and no others.

    After adapters are attached: the state of the random generators is kept for blocks with dropout
    only, which spares the others two reads and two writes of it each.
    """
    every = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    draws = {every[number]: _draws(every[number]) for number in blocks}
    parking = Parking(lane or transfer.lane(device), device) if offload_activations else None

    def compute(block: nn.Module, *inputs: Any) -> Any:
        if block not in draws:
            return block(*inputs)
        with parking.inputs() if parking else nullcontext():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws[block])

    transformer.enable_gradient_checkpointing(compute)


def _draws(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())


class Parking:
    """Keeps in RAM what recomputed blocks start from, and fetches it a block ahead.

    torch's `save_on_cpu` copies on the computing stream, where every copy is time lost. RAM is used
    again by whoever comes next: one lane does all copies, so its come after those of the last user.
    """

    def __init__(self, lane: Lane, device: torch.device) -> None:
        """lane: for both directions, so that nothing is fetched before it was put away."""
        self.lane, self.device = lane, device
        self._newest: weakref.ref[_Inputs] | None = None
        self._leaving: Any = None
        self._unused: list[HostMemory] = []

    def inputs(self) -> saved_tensors_hooks:
        """Around one checkpointed block. What the block saves itself is the checkpoint's.

        Computing waits here for what the block before it started from to be put away, and that
        memory of the device is free: two blocks' inputs are there at most.
        """
        if self._leaving is not None:
            self.lane.wait(self._leaving)
        inputs = _Inputs(self, before=self._newest)
        self._newest = weakref.ref(inputs)
        return saved_tensors_hooks(inputs.park, inputs.take)

    def put_away(self, tensor: Tensor) -> "tuple[HostMemory, Tensor]":
        """The memory that it goes to, and what it is there."""
        there = torch.empty_like(tensor, device="meta")
        memory = self._memory(there.nbytes)
        host = memory.bytes[: there.nbytes].view(there.dtype)
        host = host.as_strided(there.shape, there.stride())
        self._leaving = self.lane.copy(host, tensor.detach())
        return memory, host

    def take_back(self, parked: "list[tuple[HostMemory, Tensor]]") -> None:
        """The memory of what nobody will fetch any more."""
        self._unused += [memory for memory, _ in parked]

    def _memory(self, size: int) -> HostMemory:
        """The smallest that is large enough; a new one takes the place of one that isn't."""
        self._unused.sort(key=lambda memory: memory.bytes.nbytes)
        for number, memory in enumerate(self._unused):
            if memory.bytes.nbytes >= size:
                return self._unused.pop(number)
        if self._unused:
            self._unused.pop()
        return HostMemory(size, device=self.device, remedy=REMEDY)


class _Inputs:
    """What one block starts from; the graph keeps it alive."""

    def __init__(self, parking: Parking, *, before: "weakref.ref[_Inputs] | None") -> None:
        self._parking = parking
        self._before = before
        self._parked: list[tuple[HostMemory, Tensor]] = []
        self._fetched: dict[int, tuple[Tensor, Any]] = {}
        self._started = 0
        weakref.finalize(self, parking.take_back, self._parked).atexit = False

    def park(self, tensor: Tensor) -> Tensor | int:
        """Leaves stay: all blocks share the modulation, and nothing trains before the first."""
        if tensor.is_leaf:
            return tensor
        self._parked.append(self._parking.put_away(tensor))
        return len(self._parked) - 1

    def take(self, kept: Tensor | int) -> Tensor:
        """On the device again, with the inputs of the block below on their way."""
        if isinstance(kept, Tensor):
            return kept
        self.fetch()
        before = self._before and self._before()
        if before:
            before.fetch()
        if kept not in self._fetched:  # a second backward through the same graph
            self._fetch(kept)
        tensor, arrived = self._fetched.pop(kept)
        self._parking.lane.wait(arrived)
        return tensor

    def fetch(self) -> None:
        """Start to copy all of them, once."""
        while self._started < len(self._parked):
            self._fetch(self._started)
            self._started += 1

    def _fetch(self, number: int) -> None:
        _, host = self._parked[number]
        tensor = torch.empty_like(host, device=self._parking.device)
        self._fetched[number] = tensor, self._parking.lane.copy(tensor, host)
