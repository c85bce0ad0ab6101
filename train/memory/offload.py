"""Streaming of the transformer's frozen weights: some blocks' are in RAM, and come when needed.

The streamed blocks of one layout share a ring of device slots, block j always in slot j mod k. Its
parameters are views of that slot for good, so a compiled block keeps its pointers; and the slot is
filled through a tensor of its own, so autograd, which looks at the parameters' version, accepts
that a block that isn't recomputed saved them in the forward and finds them again in the backward.
Weights go to the device only, and never come back: they don't change. While a block computes, the
next of the ring are on their way, ascending in the forward and descending in the backward. A block
that wasn't foreseen is copied when it is used: slower, never wrong.

Hooks say when a block is used: before its forward, a recomputation's too, and when a gradient
reaches its output. By then every reader of other blocks is enqueued: the forward runs block by
block, and autograd runs what is ready in the reverse order of the forward, so a block's nodes
before those of the block below. That is what `transfer.Lane.copy` asks for.

Owns which weights are where. Streams, events and page-locked RAM are `transfer`'s; how many blocks
stay resident is decided from a budget elsewhere.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.errors import ConfigError
from train.memory import transfer
from train.memory.transfer import HostMemory, Lane

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"

SLOTS = 3
"""One computes, one is there, one is being filled; with two, copies wait for the block before."""

ALIGNMENT = 256
"""Bytes; no kernel asks for more."""

REMEDY = "keep more blocks on the GPU (memory.resident_blocks)"


def streamed(double: int, single: int, *, resident: int) -> list[str]:
    """Names of the blocks that don't stay on the device, in the order of the forward pass.

    Single blocks first, evenly spread, so that each copy has the same time: a double block takes
    as long to compute and has twice the bytes. Raises ConfigError for more than there are.
    """
    if not 0 <= resident <= double + single:
        raise ConfigError(
            f"memory.resident_blocks: {resident}, but the base has {double + single} blocks. "
            "Write all, or fewer."
        )
    away = double + single - resident
    singles = min(away, single)
    return [f"{DOUBLE}.{i}" for i in _spread(away - singles, double)] + [
        f"{SINGLE}.{i}" for i in _spread(singles, single)
    ]


def _spread(count: int, total: int) -> list[int]:
    """`count` of `total` numbers, each in the middle of its share."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


@dataclass(frozen=True)
class Footprint:
    """Bytes of the blocks' frozen weights."""

    device: int
    """Of the resident blocks and of the slots."""
    host: int
    """Page-locked, of the streamed blocks."""


def footprint(
    double: Sequence[int], single: Sequence[int], *, resident: int, slots: int = SLOTS
) -> Footprint:
    """What `attach` will take. double, single: `packed_bytes` of each block."""
    sizes = {f"{DOUBLE}.{i}": size for i, size in enumerate(double)}
    sizes |= {f"{SINGLE}.{i}": size for i, size in enumerate(single)}
    away = [sizes.pop(n) for n in streamed(len(double), len(single), resident=resident)]
    rings = sum(size * min(slots, count) for size, count in Counter(away).items())
    return Footprint(device=sum(sizes.values()) + rings, host=sum(away))


def packed_bytes(block: nn.Module) -> int:
    """Of a block's frozen weights, gaps included; a block on the meta device will do."""
    return Layout.of(_frozen(block)).size


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a block lie in a flat buffer."""

    pieces: tuple[tuple[torch.dtype, torch.Size, int], ...]
    """Type, shape and first byte of each."""
    size: int
    """Bytes in all."""

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Layout":
        """In their order, each aligned."""
        pieces, end = [], 0
        for tensor in tensors:
            assert tensor.is_contiguous(), "a frozen weight isn't contiguous"
            pieces.append((tensor.dtype, tensor.shape, end))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(pieces), end)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors on a buffer, (size,) uint8."""
        return [
            flat[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for dtype, shape, start in self.pieces
        ]


def _frozen(block: nn.Module) -> list[Tensor]:
    """What training doesn't change, in the module's order; an adapter around changes no order."""
    parameters = [p for p in block.parameters() if not p.requires_grad]
    return parameters + list(block.buffers())


class Ring:
    """The streamed blocks of one layout, numbered in the order of the forward pass."""

    def __init__(
        self, blocks: Sequence[nn.Module], *, device: torch.device, slots: int, lane: Lane
    ) -> None:
        """Take the blocks' weights into RAM one by one, each freed where it was."""
        self._lane = lane
        self.layout = Layout.of(_frozen(blocks[0]))
        size, count = self.layout.size, min(slots, len(blocks))
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        self._holds: list[int | None] = [None] * count
        self._arrived: list[Any] = [None] * count
        self._tensors = [_frozen(block) for block in blocks]
        self._versions = [[tensor._version for tensor in tensors] for tensors in self._tensors]
        self._places = [self.layout.views(self.slots[j % count]) for j in range(len(blocks))]
        self.host: list[HostMemory] = []
        for number, tensors in enumerate(self._tensors):
            memory = HostMemory(size, device=device, remedy=REMEDY)
            for tensor, there in zip(tensors, self.layout.views(memory.bytes), strict=True):
                there.copy_(tensor.detach())
            self._settle(number)
            self.host.append(memory)
        self._last, self._step = 0, 1

    def enter(self, number: int) -> None:
        """A block is about to be computed forward, or once more within the backward."""
        if not torch.is_grad_enabled():  # the next thing is the first block again
            self._use(number, step=1, around=True)
        elif number == self._last:  # the backward was here a moment ago: it is a recomputation
            self._use(number, step=self._step, around=False)
        else:
            self._use(number, step=1, around=False)

    def enter_backward(self, number: int) -> None:
        """The gradient is about to pass through a block."""
        self._use(number, step=-1, around=False)

    def true_weights(self, number: int) -> dict[int, Tensor]:
        """A block's weights in RAM, by the id of the tensor that stands for each."""
        there = self.layout.views(self.host[number].bytes)
        return {id(tensor): w for tensor, w in zip(self._tensors[number], there, strict=True)}

    def _use(self, number: int, *, step: int, around: bool) -> None:
        """Enqueue the copies of a block and of those after it, and the wait for the block's."""
        self._settle(number)
        self._last, self._step = number, step
        count, slots = len(self.host), len(self.slots)
        self._fetch(number)
        taken = {number % slots}
        for ahead in range(number + step, number + step * slots, step):
            if around:
                ahead %= count
            if not 0 <= ahead < count or ahead % slots in taken:
                break
            taken.add(ahead % slots)
            self._fetch(ahead)
        self._lane.wait(self._arrived[number % slots])

    def _fetch(self, number: int) -> None:
        slot = number % len(self.slots)
        if self._holds[slot] != number:
            self._holds[slot] = None  # were the copy to fail
            self._arrived[slot] = self._lane.copy(self.slots[slot], self.host[number].bytes)
            self._holds[slot] = number

    def _settle(self, number: int) -> None:
        """Put a block's tensors into its slot, also again if the whole model was moved since."""
        tensors = zip(
            self._tensors[number], self._places[number], self._versions[number], strict=True
        )
        for tensor, place, version in tensors:
            assert tensor._version == version, "a streamed weight was written to, and that is lost"
            if tensor.data_ptr() != place.data_ptr():
                assert tensor.dtype == place.dtype, "a streamed weight was cast"
                tensor.data = place


@dataclass(frozen=True)
class Streaming:
    """What `attach` did."""

    blocks: list[str]
    footprint: Footprint


def attach(
    transformer: Any,
    *,
    resident: int,
    device: torch.device,
    slots: int = SLOTS,
    lane: Lane | None = None,
) -> Streaming:
    """Stream all but `resident` blocks from now on, and move the rest of the model to `device`.

    After adapters are attached: trainable weights stay on the device. The model may lie anywhere;
    RAM grows by a block at a time. From here on its `state_dict` finds the streamed weights in RAM,
    and loading into them, merging or casting isn't possible.
    Raises ConfigError for more blocks than there are and MachineError without enough RAM that can
    be page-locked.
    """
    blocks = _blocks(transformer)
    names = streamed(*_counts(transformer), resident=resident)
    staying = sum(packed_bytes(block) for name, block in blocks.items() if name not in names)
    groups: dict[Layout, list[str]] = defaultdict(list)
    for name in names:
        groups[Layout.of(_frozen(blocks[name]))].append(name)
    lane = lane or transfer.lane(device)
    rings = []
    for members in groups.values():
        group = [blocks[name] for name in members]
        rings.append(Ring(group, device=device, slots=slots, lane=lane))
        for number, block in enumerate(group):
            _watch(block, ring=rings[-1], number=number)
    transformer.to(device)
    on_device = staying + sum(len(ring.slots) * ring.layout.size for ring in rings)
    host = sum(len(ring.host) * ring.layout.size for ring in rings)
    return Streaming(names, Footprint(on_device, host))


def _counts(transformer: Any) -> tuple[int, int]:
    return len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)


def _blocks(transformer: Any) -> dict[str, nn.Module]:
    names = streamed(*_counts(transformer), resident=0)
    return {name: transformer.get_submodule(name) for name in names}


def _watch(block: nn.Module, *, ring: Ring, number: int) -> None:
    """Tell the ring when a block is used, and its `state_dict` where its weights are.

    The backward's sign is a hook on the outputs. A module's full backward pre-hook would do, too,
    but passes all inputs and outputs through a node of its own.
    """

    def enter(module: nn.Module, inputs: Any) -> None:
        ring.enter(number)

    def leave(module: nn.Module, inputs: Any, outputs: Tensor | tuple[Tensor, ...]) -> None:
        for tensor in outputs if isinstance(outputs, tuple) else (outputs,):
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: ring.enter_backward(number))

    def correct(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        weights = ring.true_weights(number)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if prefix + name in state and id(tensor) in weights:
                state[prefix + name] = weights[id(tensor)]

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave)
    block.register_state_dict_post_hook(correct)
