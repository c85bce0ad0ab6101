"""Optimizers and learning-rate schedules, through the libraries that own them."""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from train.config import OptimConfig


def build_optimizer(
    optim: OptimConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer over the adapter's fp32 parameters."""
    parameters = list(parameters)
    if optim.name == "adamw8bit":
        import bitsandbytes

        optimizer_class = bitsandbytes.optim.AdamW8bit
    else:
        fused = all(p.is_cuda for p in parameters)  # one kernel instead of a dozen
        optimizer_class = partial(torch.optim.AdamW, fused=fused)
    return optimizer_class(
        parameters,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )


def rate(optim: OptimConfig, *, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`, as a fraction of its peak."""
    if step < optim.warmup:
        return (step + 1) / (optim.warmup + 1)
    progress = (step - optim.warmup) / max(1, steps - optim.warmup)
    match optim.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step use this learning rate: no scheduler object, so nothing to save."""
    for group in optimizer.param_groups:
        group["lr"] = lr
