"""Learning-rate schedules and the optimizers behind their names."""

import math

import pytest
import torch
from torch import nn

from train import optim
from train.config import OptimConfig


def rates(*, steps: int = 10, **settings) -> list[float]:
    """All fractions of a run."""
    return [optim.rate(OptimConfig(**settings), step=step, steps=steps) for step in range(steps)]


def test_constant():
    assert rates() == [1.0] * 10


def test_linear_falls_to_zero_after_the_last_step():
    assert rates(schedule="linear") == pytest.approx([1 - i / 10 for i in range(10)])


def test_cosine_is_half_a_cosine():
    expected = [0.5 + 0.5 * math.cos(math.pi * i / 10) for i in range(10)]
    assert rates(schedule="cosine") == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_in_equal_steps_to_the_peak(schedule):
    found = rates(schedule=schedule, warmup=3)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert max(found) == 1
    assert min(found) > 0


def test_the_rate_is_set_for_every_group():
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)])
    optim.set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(("name", "kind"), [("adamw", "torch"), ("adamw8bit", "bitsandbytes")])
def test_settings_reach_the_optimizer(name, kind):
    config = OptimConfig(name=name, lr=0.5, betas=(0.8, 0.7), weight_decay=0.25, eps=1e-3)
    optimizer = optim.build_optimizer(config, [nn.Parameter(torch.zeros(3))])
    assert type(optimizer).__module__.startswith(kind)
    (group,) = optimizer.param_groups
    found = {key: group[key] for key in ("lr", "betas", "weight_decay", "eps")}
    assert found == {"lr": 0.5, "betas": (0.8, 0.7), "weight_decay": 0.25, "eps": 1e-3}


def steps(name: str, shape: tuple[int, ...]) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A parameter after ten steps down a quadratic."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    optimizer = optim.build_optimizer(
        OptimConfig.model_validate({"name": name, "lr": 0.05}), [weight]
    )
    for _ in range(10):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    return weight, optimizer


def test_adamw8bit_has_8_bit_moments_from_4096_elements_on():
    """And so a tiny adapter doesn't test it."""
    _, large = steps("adamw8bit", (64, 64))
    (state,) = large.state.values()
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    _, small = steps("adamw8bit", (64, 63))
    (state,) = small.state.values()
    assert state["state1"].dtype == torch.float32


def test_adamw8bit_goes_where_adamw_goes():
    """8 bits resolve the moments to about a percent; ten steps of 0.05 can part by little more."""
    exact, _ = steps("adamw", (64, 64))
    coarse, _ = steps("adamw8bit", (64, 64))
    assert (exact - coarse).abs().mean() < 0.05 * 10 * 0.02
