"""Optimizers and learning-rate schedules, through the libraries that own them.

Owns how a config's settings become a library's. What else is kept of the weights (averages) is
`average`'s, what an optimizer's state weighs `budget`'s.
"""

import math
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from train.config import OptimConfig
from train.errors import MachineError

PACKAGES = {"prodigy": "prodigyopt", "schedulefree": "schedulefree"}
"""Optimizers whose package comes with kindling[optim] only."""

CHANGEABLE = ("weight_decay", "eps")
"""Settings that a resumed run may have otherwise; the learning rate is set at each step."""


def require(optim: OptimConfig) -> None:
    """Raises MachineError if the optimizer's package isn't installed; imports nothing."""
    package = PACKAGES.get(optim.name)
    if package and find_spec(package) is None:
        raise MachineError(
            f"optim.name is '{optim.name}' but {package} isn't installed: "
            'pip install "kindling[optim]", or set optim.name: adamw'
        )


def build_optimizer(
    optim: OptimConfig, parameters: Iterable[nn.Parameter], *, up: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer over the adapter's fp32 parameters.

    up: those of them that lora_plus gives another rate; they become the last group. Vectors, which
    are DoRA's magnitudes, have a group without decay: that would draw weights to zero, not updates.
    Raises MachineError if its package isn't installed.
    """
    require(optim)
    chosen = {id(parameter) for parameter in up} if optim.lora_plus is not None else set()
    parameters = list(parameters)
    matrices = [p for p in parameters if p.ndim > 1 and id(p) not in chosen]
    groups: list[dict[str, Any]] = [{"params": matrices}]
    if vectors := [p for p in parameters if p.ndim == 1]:
        groups.append({"params": vectors, "weight_decay": 0.0})
    if optim.lora_plus is not None:
        groups.append({"params": [p for p in parameters if id(p) in chosen]})
        assert all(group["params"] for group in groups), "LoRA+ needs both halves"
    optimizer = _construct(optim, groups)
    set_rate(optimizer, optim.lr, lora_plus=optim.lora_plus)
    return optimizer


def _construct(optim: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Settings that the config doesn't have are the library's, or those named here."""
    common: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    adam = common | {"betas": optim.betas, "eps": optim.eps}
    match optim.name:
        case "adamw":
            on_gpu = all(p.is_cuda for group in groups for p in group["params"])
            return torch.optim.AdamW(groups, **adam, fused=on_gpu or None)
        case "adamw8bit" | "paged_adamw8bit" | "lion8bit":
            from bitsandbytes import optim as bnb

            if optim.name == "lion8bit":
                return _unwaited(bnb.Lion8bit)(groups, **common, betas=optim.betas)
            if optim.name == "paged_adamw8bit":
                return bnb.PagedAdamW8bit(groups, **adam)
            return _unwaited(bnb.AdamW8bit)(groups, **adam)
        case "adafactor":
            return torch.optim.Adafactor(groups, **common)
        case "muon":  # scaled so that AdamW's rates suit (Liu et al. 2025, Muon is scalable)
            return torch.optim.Muon(groups, **common, adjust_lr_fn="match_rms_adamw")
        case "prodigy":  # the two switches as in diffusers' own trainers
            from prodigyopt import Prodigy

            with redirect_stdout(None):  # it prints that decay is decoupled
                return Prodigy(groups, **adam, use_bias_correction=True, safeguard_warmup=True)
        case "schedulefree":
            from schedulefree import AdamWScheduleFree

            optimizer = AdamWScheduleFree(groups, **adam)
            optimizer.train()
            return optimizer


def _unwaited(kind: Any) -> Any:
    """An optimizer of bitsandbytes that doesn't wait for the GPU after each parameter.

    Its kernels are in the stream of all others, so nothing but pages needs that. dev has 384
    parameters at rank 16: the GPU would be idle while each of them is started.
    """
    from bitsandbytes.optim import optimizer as library

    class Unwaited(kind):
        def step(self, closure: Any = None) -> Any:
            before, library.sync_gpu = library.sync_gpu, lambda tensor: None
            try:
                return super().step(closure)
            finally:
                library.sync_gpu = before

    return Unwaited


def rate(optim: OptimConfig, *, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`, as a fraction of its peak."""
    if step < optim.warmup:
        return (step + 1) / (optim.warmup + 1)
    length = max(1, steps - optim.warmup)
    # in whole numbers, so that a cycle starts exactly at its first step
    progress = (step - optim.warmup) * (optim.restarts + 1) % length / length
    match optim.schedule:
        case "constant":
            return 1.0
        case "linear":
            fraction = 1 - progress
        case "cosine":
            fraction = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.floor + (1 - optim.floor) * fraction


def set_rate(
    optimizer: torch.optim.Optimizer, lr: float, *, lora_plus: float | None = None
) -> None:
    """Let the next step use this learning rate: no scheduler object, so nothing to save."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if lora_plus is not None:
        optimizer.param_groups[-1]["lr"] = lr * lora_plus


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state; a config that was changed since keeps its own settings."""
    groups = optimizer.param_groups
    own = [{key: group[key] for key in CHANGEABLE if key in group} for group in groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def used_rate(optim: OptimConfig, optimizer: torch.optim.Optimizer) -> float:
    """The learning rate as it is, for prodigy with what it has found so far."""
    group = optimizer.param_groups[0]
    return group["lr"] * group["d"] if optim.name == "prodigy" else group["lr"]
