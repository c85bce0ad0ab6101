"""Whether a config fits a machine, phase by phase, and the smallest change that makes it fit.

Owns the comparison and the search; `phases` has the figures. The words are `plan`'s.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from data_tools.buckets import Geometry
from train.config import Config
from train.config.schema import PIXEL_MULTIPLE
from train.errors import ConfigError
from train.planning import budget, phases
from train.planning.budget import Decision, Footprint
from train.planning.facts import Facts
from train.planning.machine import Gpu
from train.planning.metered import Meters, step_of
from train.planning.phases import Case, Phase, Pictures

GB = 1e9


@dataclass(frozen=True)
class Room:
    """What a machine has, in bytes; None where it isn't known or isn't asked."""

    gpu: Gpu | None
    ram: int | None
    disk: int | None
    processes: int = 1
    """GPUs of its kind that the base is in parts on."""


@dataclass(frozen=True)
class Forecast:
    """A config on a machine."""

    config: Config
    pictures: Pictures
    metered: Footprint
    decision: Decision
    phases: tuple[Phase, ...]
    limit: int | None
    """Bytes of GPU memory that the run may use; None without a GPU."""
    lacking: tuple[str, ...]
    """What doesn't fit, in words."""

    @property
    def fits(self) -> bool:
        """All of it."""
        return not self.lacking


@dataclass(frozen=True)
class Remedy:
    """Settings that make a config fit, and what becomes of it."""

    changes: Mapping[str, Any]
    forecast: Forecast


def forecast(
    config: Config, facts: Facts, pictures: Pictures, *, room: Room, meters: Meters
) -> Forecast:
    """Every phase of a config, and what doesn't fit. Raises ConfigError for bad targets."""
    step = step_of(config, pictures.target, pictures.references)
    metered = meters.step(config.lora, step)
    limit = limit_of(config, room.gpu)
    apart, held, memory = room.processes > 1, metered, config.memory
    if apart:
        held, memory = budget.sharded(metered, memory, processes=room.processes)
    decision = budget.decide(
        held,
        memory,
        optim=config.optim,
        ema=config.train.ema is not None,
        budget=None if limit is None else budget.allowed(limit),
    )
    if apart and decision.choice.resident < len(metered.blocks):
        raise ConfigError(
            "memory.resident_blocks: a base in parts on several GPUs can't be streamed, too. Write "
            "all, or plan without --sharded."
        )
    case = Case(config, facts, pictures, room.gpu, meters, metered, decision, room.processes)
    listed = tuple(phases.phases(case))
    lacking = tuple(_lacking(listed, facts, limit=limit, room=room))
    return Forecast(config, pictures, metered, decision, listed, limit, lacking)


def limit_of(config: Config, gpu: Gpu | None) -> int | None:
    """GPU memory that a run may use."""
    own = config.memory.budget_gb
    if gpu is None:
        return None if own is None else int(own * GB)
    return gpu.free if own is None else min(gpu.free, int(own * GB))


def _lacking(
    listed: tuple[Phase, ...], facts: Facts, *, limit: int | None, room: Room
) -> Iterator[str]:
    for phase in listed:
        need = budget.needed(phase.gpu) if phase.gpu else 0
        if limit is not None and need > (usable := budget.usable(limit)):
            have = f"{usable / GB:.1f} of {limit / GB:.1f} without the margin"
            yield f"{phase.name}: {need / GB:.1f} GB of GPU memory, there are {have}"
        if room.ram is not None and phase.ram > room.ram:
            yield f"{phase.name}: {phase.ram / GB:.0f} GB of RAM, there are {room.ram / GB:.0f}"
    disk = facts.fetched + sum(phase.disk for phase in listed)
    if room.disk is not None and disk > room.disk:
        yield f"all of it: {disk / GB:.0f} GB of disk, there are {room.disk / GB:.0f}"


def remedy(found: Forecast, facts: Facts, *, room: Room, meters: Meters) -> Remedy | None:
    """The smallest change after which everything fits; None if there is none.

    Fewer changed settings before more, in the order of what they cost: recomputation, 8 bits, 4
    bits, streaming, offloading, and smaller pictures only if nothing else does it.
    """
    for changes in _candidates(found.config):
        config = changed(found.config, changes)
        pictures = _resized(found, config)
        now = forecast(config, facts, pictures, room=room, meters=meters)
        if now.fits:
            return Remedy(changes, now)
    return None


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with some settings (section.key) otherwise."""
    tree = config.model_dump()
    for name, value in changes.items():
        section, key = name.split(".")
        tree[section][key] = value
    return Config.model_validate(tree)


OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "memory.gradient_checkpointing": ("all",),
    "base.quantize": ("fp8", "nf4"),
    "memory.resident_blocks": ("auto",),
    "memory.offload_activations": (True,),
    "encode.text_quantize": ("int8", "nf4"),
    "preview.width": (512,),
}
"""What the search may set, by what it costs: of as many changes the first to come is preferred."""

SMALLER = (768, 512)
"""Resolutions to fall back to."""


def _candidates(config: Config) -> Iterator[dict[str, Any]]:
    """Sets of changes, the least first."""
    smaller = [side for side in SMALLER if side < max(config.data.resolutions)]
    for side in (None, *smaller):
        rows = []
        for picks in product(*(range(len(values) + 1) for values in OPTIONS.values())):
            changes = {
                name: values[pick - 1]
                for pick, (name, values) in zip(picks, OPTIONS.items(), strict=True)
                if pick
            }
            if _sensible(config, changes):
                rows.append((len(changes), tuple(reversed(picks)), changes))
        for _, _, changes in sorted(rows, key=lambda row: row[:2]):
            if "preview.width" in changes:
                changes["preview.height"] = changes["preview.width"]
            if side is not None:
                changes["data.resolution"] = side
            if changes:
                yield changes


def _sensible(config: Config, changes: Mapping[str, Any]) -> bool:
    """Whether all of it is a change, and one for less memory; auto has tried all values."""
    if any(_value(config, name) == "auto" for name in changes):
        return False
    if "preview.width" in changes and not config.preview.texts:
        return False
    if changes.get("base.quantize") == "fp8" and config.base.quantize != "none":
        return False
    if changes.get("encode.text_quantize") == "int8" and config.encode.text_quantize != "none":
        return False
    if changes.get("memory.offload_activations") and config.memory.gradient_checkpointing == "none":
        return "memory.gradient_checkpointing" in changes
    return all(_value(config, name) != value for name, value in changes.items())


def _value(config: Config, name: str) -> Any:
    section, key = name.split(".")
    return config.model_dump()[section][key]


def _resized(found: Forecast, config: Config) -> Pictures:
    """The same pictures at another resolution, by area."""
    before, after = max(found.config.data.resolutions), max(config.data.resolutions)
    if before == after:
        return found.pictures
    old = found.pictures.target
    sides = (
        max(PIXEL_MULTIPLE, side * after // before // PIXEL_MULTIPLE * PIXEL_MULTIPLE)
        for side in (old.width, old.height)
    )
    return replace(found.pictures, target=Geometry(*sides))
