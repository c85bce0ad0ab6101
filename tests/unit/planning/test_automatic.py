"""Settings left to the machine, in numbers: alone, and where several have the base in parts."""

from typing import Any

import pytest
import torch

from data_tools.buckets import Geometry
from train import parallel
from train.assemble import Memory
from train.config import Config
from train.errors import ConfigError
from train.loading.shapes import Shape
from train.planning import automatic, budget, phases
from train.planning.footprint import meter_step

CPU = torch.device("cpu")
SHAPE = Shape(double=2, single=28, heads=8, text_width=512, guidance=True)
LARGEST = ((512, 512),)
BLOCKS = 30


def config(**memory: Any) -> Config:
    """Of a bf16 base."""
    tree = {"name": "x", "data": {"path": "x"}, "train": {"steps": 1}, "lora": {"rank": 4}}
    return Config.model_validate({**tree, "memory": {"gradient_checkpointing": "auto", **memory}})


def settle(settings: Config, *, processes: int) -> tuple[Memory, str]:
    """On a machine of which only the budget is known."""
    return automatic.settle(
        settings, shape=SHAPE.config(), examples=[LARGEST], device=CPU, processes=processes
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What processes agreed on; another one always has 10 GB less."""
    values: list[int] = []

    def least(value: int, *, device: torch.device) -> int:
        values.append(value)
        return value - 10**10

    monkeypatch.setattr(parallel, "least", least)
    return values


def needed(*, recomputed: int, processes: int) -> int:
    """GPU memory that a choice takes."""
    settings = config()
    step = phases.step_of(settings, Geometry(512, 512), ())
    metered = meter_step(SHAPE.config(), settings.lora, step)
    if processes > 1:
        metered, _ = budget.sharded(metered, settings.memory, processes=processes)
    choice = budget.Choice(frozenset(range(recomputed)), BLOCKS, False)
    return budget.needed(budget.measure(metered, choice, optim=settings.optim).gpu)


@pytest.mark.parametrize("processes", [1, 4])
def test_as_few_are_recomputed_as_fit(processes: int, asked: list[int]) -> None:
    """Whole or in parts, and no fewer than where the process with the least memory needs it."""
    most, least = (needed(recomputed=count, processes=processes) for count in (3, 2))
    assert most < least
    limit = (most + least) / 2 / (1 - budget.MARGIN) / 1e9 + (10 if processes > 1 else 0)
    memory, said = settle(config(budget_gb=limit), processes=processes)
    assert memory.recomputed == frozenset(range(3))
    assert memory.streamed == []
    assert f"3 of {BLOCKS} blocks recomputed, all resident" in said
    assert asked == ([] if processes == 1 else [int(limit * 1e9)])


def test_parts_are_never_streamed(asked: list[int]) -> None:
    assert not settle(config(resident_blocks="auto", budget_gb=100), processes=4)[0].streamed
    limit = needed(recomputed=BLOCKS, processes=2) / (1 - budget.MARGIN) / 1e9 - 0.01
    assert settle(config(resident_blocks="auto", budget_gb=limit), processes=1)[0].streamed
    with pytest.raises(ConfigError, match="the smallest that these settings allow takes"):
        settle(config(resident_blocks="auto", budget_gb=limit + 10), processes=2)


def test_without_a_limit_all_is_recomputed(asked: list[int]) -> None:
    memory, said = settle(config(), processes=2)
    assert memory.recomputed == frozenset(range(BLOCKS))
    assert "no limit known" in said
    assert asked == []
