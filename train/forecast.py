"""Whether a config fits a machine, phase by phase, and the smallest change that makes it fit.

Owns the comparison and the search; `phases` has the figures. The words are `plan`'s.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from train import budget, footprint, phases
from train.budget import Decision, Footprint
from train.config import Config
from train.facts import Facts
from train.machine import Gpu
from train.phases import Phase, Pictures

GB = 1e9


@dataclass(frozen=True)
class Room:
    """What a machine has, in bytes; None where it isn't known or isn't asked."""

    gpu: Gpu | None
    ram: int | None
    disk: int | None


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


class Meters:
    """Footprints by what they depend on: the search asks for the same ones again and again."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._known: dict[tuple, Footprint] = {}

    def of(self, config: Config, pictures: Pictures) -> Footprint:
        """Of a config's training step."""
        step = phases.step_of(config, pictures)
        name = (config.lora, step)
        if name not in self._known:
            self._known[name] = footprint.meter_step(self._facts.transformer, config.lora, step)
        return self._known[name]


def forecast(
    config: Config, facts: Facts, pictures: Pictures, *, room: Room, meters: Meters
) -> Forecast:
    """Every phase of a config, and what doesn't fit. Raises ConfigError for bad targets."""
    metered = meters.of(config, pictures)
    limit = limit_of(config, room.gpu)
    decision = budget.decide(
        metered,
        config.memory,
        optim=config.optim,
        budget=None if limit is None else budget.allowed(limit),
    )
    listed = tuple(
        phases.phases(config, facts, pictures, metered=metered, decision=decision, gpu=room.gpu)
    )
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
        if limit is not None and need > limit:
            yield f"{phase.name}: {need / GB:.1f} GB of GPU memory, there are {limit / GB:.1f}"
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


def _candidates(config: Config) -> Iterator[dict[str, Any]]:
    """Sets of changes, the least first."""
    now = config.model_dump()
    options: dict[str, list[Any]] = {
        "memory.gradient_checkpointing": ["all"],
        "base.quantize": ["fp8", "nf4"],
        "memory.resident_blocks": ["auto"],
        "memory.offload_activations": [True],
        "encode.text_quantize": ["int8", "nf4"],
        "preview.width": [512],
    }
    if not config.preview.prompts:
        del options["preview.width"]
    smaller = [side for side in (768, 512) if side < max(config.data.resolutions)]
    rows = []
    for sides in (None, *smaller):
        for values in product(*([None, *some] for some in options.values())):
            changes = {
                name: value
                for name, value in zip(options, values, strict=True)
                if value is not None
            }
            if any(now[n.split(".")[0]][n.split(".")[1]] == v for n, v in changes.items()):
                continue
            if changes.get("base.quantize") == "fp8" and config.base.quantize != "none":
                continue
            if "preview.width" in changes:
                changes["preview.height"] = 512
            if sides is not None:
                changes["data.resolution"] = sides
            rank = tuple(
                0 if value is None else 1 + some.index(value)
                for some, value in zip(options.values(), values, strict=True)
            )
            rows.append(((sides or 10**6), len(changes), tuple(reversed(rank)), changes))
    rows.sort(key=lambda row: (-row[0], row[1], row[2]))
    yield from (row[3] for row in rows if row[3])


def _resized(found: Forecast, config: Config) -> Pictures:
    """The same pictures at another resolution, by area."""
    from dataclasses import replace

    from data_tools.buckets import Geometry

    before, after = max(found.config.data.resolutions), max(config.data.resolutions)
    if before == after:
        return found.pictures
    old, step = found.pictures.target, 16
    sides = (max(step, side * after // before // step * step) for side in (old.width, old.height))
    return replace(found.pictures, target=Geometry(*sides))
