"""Averages of the weights over the training's course, to be seen in place of the last ones.

Owns the averages and lending them to the model. The weights that are trained come back to the bit,
so that a run goes on as if nobody had looked. When one is shown is the trainer's.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Ema:
    """An exponential moving average in fp32, of which the optimizer knows nothing."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, decay: float) -> None:
        self._parameters: list[torch.Tensor] = list(parameters)
        self._decay = decay
        self._mean: list[torch.Tensor] = []
        self.restart()

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Take in the weights after the `done`-th step."""
        kept = ema_decay(self._decay, done=done)
        torch._foreach_lerp_(self._mean, self._parameters, 1 - kept)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the model has the average."""
        with _kept(self._parameters):
            _copy(self._mean, self._parameters)
            yield

    def restart(self) -> None:
        """Start from the weights that the model has now."""
        self._mean = [parameter.detach().float().clone() for parameter in self._parameters]


class ScheduleFree:
    """The average that a schedule-free optimizer keeps itself, in its own state."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, optimizer: Any) -> None:
        self._parameters: list[torch.Tensor] = list(parameters)
        self._optimizer = optimizer

    def update(self, done: int) -> None:
        """The optimizer's step did it."""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the model has the average. The library's way back alone would round."""
        with _kept(self._parameters):
            self._optimizer.eval()
            try:
                yield
            finally:
                self._optimizer.train()

    def restart(self) -> None:
        """The optimizer's own state has it."""


Average = Ema | ScheduleFree


def ema_decay(decay: float, *, done: int) -> float:
    """The decay of the `done`-th step (from 1): at first (1 + n) / (10 + n), then `decay`.

    So that the start is soon forgotten, as in TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + done) / (10 + done))


@contextmanager
def _kept(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Whatever happens inside, the parameters are the same after it. Meanwhile they are in RAM."""
    own = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        _copy(own, parameters)


@torch.no_grad()
def _copy(values: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
