"""Does a training step fit, and which `auto` settings make it fit: arithmetic on what was metered.

Owns the timeline of a step and the decision; pure functions of their arguments, no torch, no GPU.
What the blocks take is `footprint`'s to find out. All sizes are bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from train.config import MemoryConfig, OptimConfig

RING = 3
"""Slots of one block's weights that streaming keeps on the GPU, for each kind of block."""

CONTEXT = 600 * 10**6
"""Assumed, not measured yet: the CUDA context, cuBLAS' and cuDNN's own memory."""
FRAGMENTATION = 0.03
"""Assumed, not measured yet: what the allocator reserves beyond what is allocated, a share."""

STATE = {
    "adamw": 8.0,
    "adamw8bit": 2.0 + 2 * 4 / 256,
    "paged_adamw8bit": 2.0 + 2 * 4 / 256,
    "lion8bit": 1.0 + 4 / 256,
    "adafactor": 4.0,
    "prodigy": 16.0,
    "schedulefree": 8.0,
    "muon": 4.0,
}
"""Bytes a parameter that the optimizer keeps: moments in fp32, or in 8 bits with a scale for 256 of
them (pages count as if they stayed). At most: adafactor's rows and columns are so many at rank 1
only, and prodigy doesn't keep a start at zero."""
SCRATCH = dict.fromkeys(STATE, 0.0) | {"adamw": 4.0, "schedulefree": 4.0}
"""Bytes a parameter that the optimizer's step takes for its own time: the foreach AdamWs make the
square roots of all second moments at once."""
WEIGHT = 4
"""Bytes of a LoRA weight, and of its gradient."""


@dataclass(frozen=True)
class Pass:
    """A stretch of a step, relative to what was held when it began."""

    peak: int
    """Held at most during it."""
    change: int
    """Held when it is over."""


@dataclass(frozen=True)
class Block:
    """A transformer block in a training step."""

    name: str
    """Of the module: transformer_blocks.0 and on, then single_transformer_blocks.0 and on."""
    weights: int
    """Its frozen weights, as they are kept."""
    kept: tuple[Pass, Pass]
    """Forward and backward when its activations are kept."""
    recomputed: tuple[Pass, Pass]
    """The same when they are recomputed."""

    @property
    def single(self) -> bool:
        """Whether it is a single-stream block."""
        return self.name.startswith("single")


@dataclass(frozen=True)
class Footprint:
    """What a training step of one geometry takes, block by block, in the order of execution."""

    blocks: tuple[Block, ...]
    others: int
    """Frozen weights outside the blocks."""
    parameters: int
    """Of the adapter."""
    head: Pass
    """Before the first block: the batch, its embeddings."""
    turn: Pass
    """From the last block's end to the start of its backward: the output and the loss."""
    accumulated: bool
    """Gradients of a batch before are there all along."""

    @property
    def weights(self) -> int:
        """All frozen weights."""
        return self.others + sum(block.weights for block in self.blocks)


@dataclass(frozen=True)
class Choice:
    """Concrete values of the memory settings."""

    recomputed: tuple[str, ...]
    """Blocks whose activations are recomputed, by name, in order of execution."""
    resident: int
    """Blocks whose weights stay on the GPU; the others are streamed."""
    offload: bool
    """What recomputed blocks start from waits in RAM."""


@dataclass(frozen=True)
class Need:
    """What a choice takes."""

    gpu: int
    """Allocated on the GPU at most, by torch's count."""
    where: str
    """The part of a step that needs it."""
    held: int
    """Of it what a step begins with: weights, adapter, optimizer."""
    ram: int
    """Pinned RAM: streamed weights, offloaded activations."""
    gradients: int
    """Of the adapter; a step ends with them."""


@dataclass(frozen=True)
class Decision:
    """The choice for a budget, and whether it fits."""

    choice: Choice
    need: Need
    fits: bool


def allowed(memory: int | float) -> int:
    """What torch may allocate of a GPU's memory: less what isn't torch's, and its own slack."""
    return int((memory - CONTEXT) / (1 + FRAGMENTATION))


def needed(allocated: int | float) -> int:
    """The inverse: GPU memory for so much allocated."""
    return int(allocated * (1 + FRAGMENTATION) + CONTEXT)


def order(footprint: Footprint) -> tuple[str, ...]:
    """Which blocks to recompute first: those that run first.

    A block that is recomputed costs the same time wherever it stands, but the last blocks' backward
    comes when everything else is still held: recomputing them there saves nothing.
    """
    return tuple(block.name for block in footprint.blocks)


def streamed(footprint: Footprint, *, resident: int) -> tuple[int, int]:
    """How many double and single blocks are streamed: double ones only after all single ones."""
    singles = sum(block.single for block in footprint.blocks)
    count = max(0, len(footprint.blocks) - resident)
    return max(0, count - singles), min(count, singles)


def measure(footprint: Footprint, choice: Choice, *, optim: OptimConfig, ema: bool = False) -> Need:
    """What a step takes at most, with the optimizer's state already there.

    ema: an average of the adapter is kept beside it.
    """
    weights, pinned = _placed(footprint, resident=choice.resident)
    adapter = footprint.parameters * WEIGHT
    gradients = adapter
    held = weights + adapter + round(footprint.parameters * STATE[optim.name])
    held += (gradients if footprint.accumulated else 0) + (adapter if ema else 0)
    level, peak, where, ram = held, held, "weights", pinned
    for name, passage in _timeline(footprint, choice):
        if level + passage.peak > peak:
            peak, where = level + passage.peak, name
        level += passage.change
    update = held + (0 if footprint.accumulated else gradients)
    update += round(footprint.parameters * SCRATCH[optim.name])
    if update > peak:
        peak, where = update, "the optimizer's step"
    if choice.offload:
        ram += starts(footprint, choice)
    return Need(peak, where, held, ram, gradients)


def decide(
    footprint: Footprint,
    memory: MemoryConfig,
    *,
    optim: OptimConfig,
    budget: int | None,
    ema: bool = False,
) -> Decision:
    """Concrete memory settings for so many bytes that torch may allocate.

    `auto` prefers resident weights to kept activations: first all blocks stay and as few as
    possible are recomputed; if that doesn't fit even with all of them, as few as possible are
    streamed. Never less is recomputed or streamed with a smaller budget. Without a budget (no GPU)
    auto means all: everything stays, everything is recomputed.
    """
    choices = list(_choices(footprint, memory))
    if budget is None:
        safe = next((c for c in choices if len(c.recomputed) == len(footprint.blocks)), choices[0])
        return Decision(safe, measure(footprint, safe, optim=optim, ema=ema), fits=True)
    for choice in choices:
        need = measure(footprint, choice, optim=optim, ema=ema)
        if need.gpu <= budget:
            return Decision(choice, need, fits=True)
    return Decision(choices[-1], measure(footprint, choices[-1], optim=optim, ema=ema), fits=False)


def _choices(footprint: Footprint, memory: MemoryConfig) -> Iterator[Choice]:
    """What the settings allow, cheapest in time first."""
    count = len(footprint.blocks)
    sets = list(_recomputed(footprint, memory))
    resident = memory.resident_blocks
    most = min(resident, count) if isinstance(resident, int) else count
    for names in sets:
        yield Choice(names, most, memory.offload_activations)
    if resident == "auto":
        for left in range(count - 1, -1, -1):
            yield Choice(sets[-1], left, memory.offload_activations)


def _recomputed(footprint: Footprint, memory: MemoryConfig) -> Iterator[tuple[str, ...]]:
    """Sets of recomputed blocks that the setting allows, smallest first."""
    names = order(footprint)
    match memory.gradient_checkpointing:
        case "all":
            yield names
        case "none":
            yield ()
        case "auto":
            yield from (names[:count] for count in range(len(names) + 1))
        case int(every):
            yield names[::every]


def _placed(footprint: Footprint, *, resident: int) -> tuple[int, int]:
    """Frozen weights on the GPU, rings included, and in RAM."""
    doubles, singles = streamed(footprint, resident=resident)
    gpu = footprint.weights
    ram = 0
    for single, count in ((False, doubles), (True, singles)):
        size = max((b.weights for b in footprint.blocks if b.single == single), default=0)
        gpu -= count * size - min(count, RING) * size
        ram += count * size
    return gpu, ram


def _timeline(footprint: Footprint, choice: Choice) -> Iterator[tuple[str, Pass]]:
    """The parts of a step, in order."""
    names = set(choice.recomputed)
    yield "the batch", footprint.head
    passes = [
        (block, block.recomputed if block.name in names else block.kept)
        for block in footprint.blocks
    ]
    away = [_start(block) if choice.offload and block.name in names else 0 for block, _ in passes]
    spare = 2 * max(away, default=0)  # one on its way out or in, one in use
    for (block, (forward, _)), gone in zip(passes, away, strict=True):
        yield f"forward of {block.name}", _offloaded(forward, change=-gone, spare=spare)
    yield "the loss", _offloaded(footprint.turn, change=0, spare=spare)
    for (block, (_, backward)), back in zip(reversed(passes), reversed(away), strict=True):
        yield f"backward of {block.name}", _offloaded(backward, change=back, spare=spare)


def _offloaded(passage: Pass, *, change: int, spare: int) -> Pass:
    return replace(passage, peak=passage.peak + spare, change=passage.change + change)


def starts(footprint: Footprint, choice: Choice) -> int:
    """All that the recomputed blocks start from."""
    names = set(choice.recomputed)
    return sum(_start(block) for block in footprint.blocks if block.name in names)


def _start(block: Block) -> int:
    """What a recomputed block starts from."""
    return max(0, block.recomputed[0].change)


def shown(choice: Choice, *, blocks: Sequence[Block]) -> str:
    """`43 of 56 blocks recomputed, all resident`, for messages."""
    count = len(blocks)
    parts = [f"{len(choice.recomputed)} of {count} blocks recomputed"]
    parts.append("all resident" if choice.resident >= count else f"{choice.resident} resident")
    return ", ".join(parts + (["their starts in RAM"] if choice.offload else []))
