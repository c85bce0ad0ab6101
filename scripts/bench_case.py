"""A case of `kindling bench train --shape`: one config on one shape, and what it is measured with.

Owns the step from a command line to a config, and from that to numbers by the same code that plans
a run. Measuring is `bench_shape`'s.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from data_tools.buckets import Geometry
from scripts import bench_base
from train.assemble import Memory
from train.config import Config
from train.errors import ConfigError, bullet_list
from train.loading.shapes import SHAPES, Shape
from train.planning import budget, footprint, machine, phases
from train.planning.budget import Decision
from train.planning.metered import step_of

GB = 1e9

KEPT = ("base", "lora", "flow", "optim", "memory", "speed")
"""Sections of a recipe that a step depends on."""


@dataclass(frozen=True)
class Case:
    """What is measured; plain values, so that it can be written down and sent to a process."""

    shape: str
    size: int
    batch: int
    sections: Mapping[str, Mapping[str, Any]]
    """Of the config, by section and key; what isn't there has its default."""
    text_tokens: int = 512
    limit_gb: float | None = None
    peer: bool = False
    steps: int = 12
    warmup: int = 2

    @property
    def arguments(self) -> Shape:
        """The transformer's."""
        return bench_base.ALL[self.shape]

    def config(self, folder: Path) -> Config:
        """A run's, in that folder. Raises ConfigError for what can't go together."""
        steps = self.warmup + self.steps
        tree = {key: dict(values) for key, values in self.sections.items()}
        tree["train"] = {"steps": steps, "batch_size": self.batch}
        tree["data"] = {"path": "memory", "resolution": self.size}
        tree["base"] = {"model": "dev", **tree.get("base", {})}
        try:
            return Config.model_validate({"name": "bench", "output": str(folder), **tree})
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()]
            raise ConfigError(
                bullet_list("bench train: these settings can't be:", faults)
            ) from None

    def step(self, config: Config) -> footprint.Step:
        """What memory and time depend on."""
        step = step_of(config, Geometry(self.size, self.size), ())
        return replace(step, text_tokens=self.text_tokens)


@dataclass(frozen=True)
class Planned:
    """What the plan says of a case before it is run."""

    memory: Memory
    """With auto settings decided."""
    decision: Decision
    seconds: float | None
    """A step; None without a GPU."""


def plan(case: Case, config: Config, *, device: torch.device) -> Planned:
    """By the code behind `kindling plan` and the auto settings."""
    shape, step = case.arguments, case.step(config)
    arguments = shape.config()
    metered = footprint.meter_step(arguments, config.lora, step)
    gpu = machine.at_hand() if device.type == "cuda" else None
    room = case.limit_gb and case.limit_gb * GB
    if room is None and gpu is not None:
        room = gpu.free
    allowed = None if room is None else budget.allowed(room)
    decision = budget.decide(metered, config.memory, optim=config.optim, budget=allowed)
    memory, choice = config.memory, decision.choice
    if "auto" in (memory.gradient_checkpointing, memory.resident_blocks):
        found = Memory(
            (shape.double, shape.single), choice.resident, choice.recomputed, choice.offload
        )
    else:
        found = Memory.of(memory, double=shape.double, single=shape.single)
    one = gpu and phases.step_seconds(arguments, step, metered, choice, gpu=gpu)
    return Planned(found, decision, one)


# ---- the command line


def of_options(options: argparse.Namespace) -> list[Case]:
    """All sizes and batches that were asked for. Raises ConfigError for a recipe that is wrong."""
    recipe = _recipe(options.config) if options.config else None
    sections: dict[str, dict[str, Any]] = {key: {} for key in KEPT}
    if recipe is not None:
        dumped = recipe.model_dump(exclude_unset=True)
        sections |= {key: dumped[key] for key in KEPT if key in dumped}
        sections["base"].pop("transformer", None)
    for section, key, value in (
        ("base", "quantize", options.quantize),
        ("base", "dtype", options.dtype),
        ("lora", "rank", options.rank),
        ("lora", "compute", options.branch),
        ("optim", "name", options.optimizer),
        ("memory", "resident_blocks", options.resident),
        ("memory", "gradient_checkpointing", options.checkpointing),
        ("memory", "offload_activations", options.offload_activations),
        ("speed", "compile", options.compile),
        ("speed", "attention", options.attention),
        ("speed", "fp8_matmul", options.fp8_matmul),
    ):
        if value is not None:
            sections[section] = {**sections[section], key: value}
    sizes = options.size or (recipe.data.resolutions if recipe else (1024,))
    batches = options.batch or [recipe.train.batch_size if recipe else 1]
    return [
        Case(
            shape=options.shape or _shape(sections["base"]),
            size=size,
            batch=batch,
            sections={key: values for key, values in sections.items() if values},
            text_tokens=options.text_tokens,
            limit_gb=options.limit_gb,
            peer=options.peer is not None,
            steps=options.steps,
            warmup=options.warmup,
        )
        for size in sizes
        for batch in batches
    ]


def _recipe(path: Path) -> Config:
    from train.config import reading

    return reading.load(path, [])


def _shape(base: Mapping[str, Any]) -> str:
    name = base.get("model", "dev")
    if name not in SHAPES:
        known = ", ".join(bench_base.ALL)
        raise ConfigError(f"base.model: the shape of {name} isn't known; give --shape {known}")
    return name
