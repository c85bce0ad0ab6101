"""Averages of the weights: their formula, lending them to the model, going on after a resume."""

from typing import Any

import pytest
import torch
from torch import nn

from train import optim
from train.average import Ema, ScheduleFree, ema_decay
from train.config import OptimConfig


def test_the_decay_warms_up_to_its_value() -> None:
    found = [ema_decay(0.5, done=done) for done in (1, 2, 8, 9, 1000)]
    assert found == pytest.approx([2 / 11, 3 / 12, 0.5, 0.5, 0.5])
    assert [ema_decay(0.5, done=done) for done in (7, 8)] == pytest.approx([8 / 17, 0.5])


def test_ema_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[8.0]]))
    ema = Ema([weight], decay=0.25)
    with torch.no_grad():
        weight.fill_(30.0)
    ema.update(1)
    first = 2 / 11 * 8 + 9 / 11 * 30
    with torch.no_grad():
        weight.fill_(2.0)
    ema.update(9)
    with ema.shown():
        assert weight.item() == pytest.approx(0.25 * first + 0.75 * 2)
    assert weight.item() == 2.0


def test_what_is_trained_waits_in_ram() -> None:
    """A preview needs no more of a GPU than the plan knows. From meta there is nothing to copy."""
    ema = Ema([nn.Parameter(torch.empty(3, 4, device="meta"))], decay=0.5)
    with pytest.raises(NotImplementedError, match="copy out of meta"), ema.shown():
        pass


def test_ema_starts_anew_from_the_models_weights() -> None:
    weight = nn.Parameter(torch.tensor([[8.0]]))
    ema = Ema([weight], decay=0.5)
    with torch.no_grad():
        weight.fill_(5.0)
    ema.restart()
    with ema.shown():
        assert weight.item() == 5.0


def schedule_free() -> tuple[nn.Parameter, Any, ScheduleFree]:
    """After five steps from zero, as an up matrix; there the way to the average rounds."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(40, 30))
    config = OptimConfig(name="schedulefree", lr=0.01)
    optimizer = optim.build_optimizer(config, [weight])
    for _ in range(5):
        weight.grad = torch.randn(40, 30)
        optimizer.step()
    return weight, optimizer, ScheduleFree([weight], optimizer=optimizer)


def test_schedule_free_shows_the_mean_of_its_iterates() -> None:
    """At a constant rate x is the plain mean of z after each step (Defazio et al. 2024)."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 6))
    config = OptimConfig(name="schedulefree", lr=0.01)
    optimizer = optim.build_optimizer(config, [weight])
    iterates = []
    for _ in range(5):
        weight.grad = torch.randn(8, 6)
        optimizer.step()
        iterates.append(optimizer.state[weight]["z"].clone())
    average = ScheduleFree([weight], optimizer=optimizer)
    trained = weight.detach().clone()
    with average.shown():
        torch.testing.assert_close(weight.detach(), torch.stack(iterates).mean(0))
        assert not torch.allclose(weight, trained)


def test_training_goes_on_to_the_bit_after_a_look() -> None:
    """The library's own way there and back rounds: else there would be nothing to test."""
    weight, optimizer, average = schedule_free()
    before = weight.detach().clone()
    with average.shown():
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)
    optimizer.eval()
    optimizer.train()
    assert not torch.equal(weight, before)


def test_the_trained_weights_come_back_from_an_error_too() -> None:
    weight, optimizer, average = schedule_free()
    ema = Ema([weight], decay=0.9)
    with torch.no_grad():
        weight.add_(1.0)
    before = weight.detach().clone()
    for lent in (average, ema):
        with pytest.raises(KeyError), lent.shown():
            raise KeyError(weight)
        assert torch.equal(weight, before)
    weight.grad = torch.randn(40, 30)
    optimizer.step()  # it would refuse in its evaluation mode
