"""Does a training step fit, and which `auto` settings make it fit: arithmetic on what was metered.

Owns the timeline of a step and the decision; pure functions of their arguments, nothing is
measured here. What the blocks take is `footprint`'s to find out; which ones are streamed with a
number of residents is `offload`'s. Blocks are numbered through. All sizes are bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from train.config import MemoryConfig, OptimConfig
from train.memory import offload, recompute

CONTEXT = 600 * 10**6
"""Assumed, not measured yet: the CUDA context, cuBLAS' and cuDNN's own memory."""
FRAGMENTATION = 0.05
"""Assumed, not measured yet: what the allocator reserves beyond what is allocated, a share."""
MARGIN = 0.03
"""Share of a GPU's memory that plans leave free: for a desktop and other programs, and because the
two constants above and the kernels' own workspace haven't been measured."""

GATHERED = 4
"""Largest blocks that are whole at once where the base is in parts on several GPUs: measured on two
CPU processes, the same for FSDP2 and ZeRO-3; on a GPU not yet."""

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

    recomputed: frozenset[int]
    """Numbers of the blocks whose activations are recomputed."""
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


def usable(memory: int | float) -> int:
    """GPU memory less the margin."""
    return int(memory * (1 - MARGIN))


def allowed(memory: int | float) -> int:
    """What torch may allocate of a GPU: less the margin, what isn't torch's, and its own slack."""
    return int((usable(memory) - CONTEXT) / (1 + FRAGMENTATION))


def needed(allocated: int | float) -> int:
    """GPU memory that so much allocated takes; the margin isn't in it."""
    return int(allocated * (1 + FRAGMENTATION) + CONTEXT)


def sharded(
    footprint: Footprint, memory: MemoryConfig, *, processes: int
) -> tuple[Footprint, MemoryConfig]:
    """What each of several processes holds that have the base in parts, and may decide.

    What is outside the blocks is gathered all along, and some blocks are. Nothing is streamed.
    """
    if memory.resident_blocks == "auto":
        memory = memory.model_copy(update={"resident_blocks": "all"})
    blocks = tuple(replace(b, weights=-(-b.weights // processes)) for b in footprint.blocks)
    gathered = footprint.others + GATHERED * max(block.weights for block in footprint.blocks)
    part = replace(footprint, blocks=blocks, others=footprint.others // processes + gathered)
    return part, memory


def measure(footprint: Footprint, choice: Choice, *, optim: OptimConfig, ema: bool = False) -> Need:
    """What a step takes at most, with the optimizer's state already there.

    ema: an average of the adapter is kept beside it.
    """
    placed = _placed(footprint, resident=choice.resident)
    adapter = footprint.parameters * WEIGHT
    gradients = adapter
    held = placed.device + adapter + round(footprint.parameters * STATE[optim.name])
    held += (gradients if footprint.accumulated else 0) + (adapter if ema else 0)
    level, peak, where = held, held, "weights"
    for name, passage in _timeline(footprint, choice):
        if level + passage.peak > peak:
            peak, where = level + passage.peak, name
        level += passage.change
    return Need(peak, where, held, placed.host + starts(footprint, choice), gradients)


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
    streamed. With a smaller budget never less is recomputed or streamed. Without a budget (no GPU)
    auto means all: everything stays, everything is recomputed.
    """
    choices = list(_choices(footprint, memory))
    blocks = len(footprint.blocks)
    if budget is None:
        choice = max(choices, key=lambda one: (one.resident, len(one.recomputed)))
        return Decision(choice, measure(footprint, choice, optim=optim, ema=ema), fits=True)
    for choice in choices:
        need = measure(footprint, choice, optim=optim, ema=ema)
        if need.gpu <= budget:
            return Decision(choice, need, fits=True)
    assert choices, f"{memory} allows nothing for {blocks} blocks"
    return Decision(choice, need, fits=False)


def _choices(footprint: Footprint, memory: MemoryConfig) -> Iterator[Choice]:
    """What the settings allow, cheapest in time first."""
    count = len(footprint.blocks)
    sets = list(_recomputed(count, memory))
    resident = memory.resident_blocks
    most = resident if isinstance(resident, int) else count
    for numbers in sets:
        yield Choice(numbers, most, memory.offload_activations)
    if resident == "auto":
        for left in range(count - 1, -1, -1):
            yield Choice(sets[-1], left, memory.offload_activations)


def _recomputed(count: int, memory: MemoryConfig) -> Iterator[frozenset[int]]:
    """Sets of recomputed blocks that the setting allows, smallest first.

    auto takes those that run first. Recomputing costs the same wherever a block stands, but the
    last blocks' backward comes while everything else is still held, and would need their
    activations on top of it.
    """
    if memory.gradient_checkpointing == "auto":
        yield from (frozenset(range(some)) for some in range(count + 1))
    else:
        yield recompute.chosen(count, memory.gradient_checkpointing)


def _placed(footprint: Footprint, *, resident: int) -> offload.Footprint:
    """Frozen weights on the GPU, slots and what isn't in blocks included, and in RAM."""
    double, single = ([b.weights for b in footprint.blocks if b.single == s] for s in (False, True))
    placed = offload.footprint(double, single, resident=resident)
    return replace(placed, device=placed.device + footprint.others)


def streamed(footprint: Footprint, *, resident: int) -> list[Block]:
    """The blocks whose weights wait in RAM."""
    singles = sum(block.single for block in footprint.blocks)
    names = offload.streamed(len(footprint.blocks) - singles, singles, resident=resident)
    return [block for block in footprint.blocks if block.name in set(names)]


def _timeline(footprint: Footprint, choice: Choice) -> Iterator[tuple[str, Pass]]:
    """The parts of a step, in order."""
    yield "the batch", footprint.head
    passes = [(block, number in choice.recomputed) for number, block in enumerate(footprint.blocks)]
    away = _parked(footprint, choice)
    moving = max(away, default=0)  # one on its way out, later one in use and one on its way in
    for (block, again), gone in zip(passes, away, strict=True):
        forward = (block.recomputed if again else block.kept)[0]
        yield f"forward of {block.name}", _moved(forward, change=-gone, spare=moving)
    yield "the loss", _moved(footprint.turn, change=0, spare=moving)
    for (block, again), back in zip(reversed(passes), reversed(away), strict=True):
        backward = (block.recomputed if again else block.kept)[1]
        yield f"backward of {block.name}", _moved(backward, change=back, spare=2 * moving)


def _moved(passage: Pass, *, change: int, spare: int) -> Pass:
    """With something put away or brought back meanwhile."""
    return Pass(passage.peak + spare, passage.change + change)


def starts(footprint: Footprint, choice: Choice) -> int:
    """All that waits in RAM for its block to be recomputed."""
    return sum(_parked(footprint, choice))


def _parked(footprint: Footprint, choice: Choice) -> list[int]:
    """By block, what is put away of what it starts from: what the block before it left.

    The first block's start stays, since nothing before it trains; so does the last one's output.
    """
    left = [0, *(max(0, block.recomputed[0].change) for block in footprint.blocks[:-1])]
    return [
        size if choice.offload and number in choice.recomputed else 0
        for number, size in enumerate(left)
    ]


def shown(choice: Choice, *, blocks: int) -> str:
    """`43 of 56 blocks recomputed, all resident`, for messages."""
    parts = [f"{len(choice.recomputed)} of {blocks} blocks recomputed"]
    parts.append("all resident" if choice.resident >= blocks else f"{choice.resident} resident")
    return ", ".join(parts + (["their starts in RAM"] if choice.offload else []))
