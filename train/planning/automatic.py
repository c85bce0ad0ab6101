"""The memory settings of a run in numbers: `auto` decided for the GPU at hand.

Owns what a decision is made from: the run's largest batch, its model and the memory that is free.
The decision itself is `budget`'s, which `kindling plan` asks, too.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from data_tools.buckets import Geometry
from train import parallel
from train.assemble import Memory
from train.config import Config
from train.errors import ConfigError
from train.planning import budget
from train.planning.footprint import meter_step
from train.planning.metered import step_of

GB = 1e9


def settle(
    config: Config,
    *,
    shape: Mapping[str, Any],
    examples: Iterable[tuple[tuple[int, int], ...]],
    device: torch.device,
    processes: int,
) -> tuple[Memory, str]:
    """The settings in numbers, and a line that says so; "" if nothing was auto.

    shape: the transformer's config. examples: width and height of each example's pictures.
    processes: those that have the base in parts, which must all ask together; 1 if it is whole.
    Metering takes about two seconds. Raises ConfigError if the budget is too small for the
    settings.
    """
    memory, double, single = config.memory, shape["num_layers"], shape["num_single_layers"]
    if "auto" not in (memory.gradient_checkpointing, memory.resident_blocks):
        return Memory.of(memory, double=double, single=single), ""
    step = step_of(config, *largest(examples))
    metered = meter_step(shape, config.lora, step)
    limit = available(config, device)
    if processes > 1:
        metered, memory = budget.sharded(metered, memory, processes=processes)
        limit = None if limit is None else parallel.least(limit, device=device)
    allowed = None if limit is None else budget.allowed(limit)
    ema = config.train.ema is not None
    decision = budget.decide(metered, memory, optim=config.optim, ema=ema, budget=allowed)
    choice = decision.choice
    if limit is not None and not decision.fits:
        raise ConfigError(
            f"memory: the smallest that these settings allow takes "
            f"{budget.needed(decision.need.gpu) / GB:.1f} GB of GPU memory, and there are "
            f"{budget.usable(limit) / GB:.1f} without the margin. `kindling plan` says which "
            "change fits."
        )
    said = budget.shown(choice, blocks=double + single)
    room = "no limit known" if limit is None else f"{limit / GB:.1f} GB"
    line = f"memory: {said} ({room}, {budget.needed(decision.need.gpu) / GB:.1f} GB expected)"
    return Memory((double, single), choice.resident, choice.recomputed, choice.offload), line


def largest(
    examples: Iterable[tuple[tuple[int, int], ...]],
) -> tuple[Geometry, tuple[Geometry, ...]]:
    """The example of most tokens: its target and its references."""
    sizes = ([Geometry(*size) for size in example] for example in examples)
    first, *others = max(sizes, key=lambda one: sum(size.tokens for size in one))
    return first, tuple(others)


def available(config: Config, device: torch.device) -> int | None:
    """GPU memory that a run may use: what is free now, or memory.budget_gb if that is less."""
    own = config.memory.budget_gb
    limit = None if own is None else int(own * GB)
    if device.type != "cuda":
        return limit
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free if limit is None else min(free, limit)
