"""peft's layers on a transformer: putting them on in fp32, and finding their tensors.

Owns peft's configs and parameter names. peft gives the adapter the base's type, in which most of
its numbers never move at the usual learning rates; here they are fp32 always.
"""

import re
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from train.config import LoraConfig
from train.lora import dora, lokr

NAME = "default"
"""Of the adapter that is trained."""

PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", *lokr.PARTS)
"""Of a layer, in peft's words."""


def add(
    transformer: Any,
    config: LoraConfig,
    targets: list[str],
    *,
    name: str = NAME,
    dropout: float = 0.0,
) -> None:
    """A fresh adapter on these modules. Raises ConfigError where a weight has no room for it."""
    magnitudes = dora.start(transformer, targets) if config.kind == "dora" else {}
    if config.kind == "lokr":
        lokr.check(transformer, targets, factor=config.factor)
        settings = peft.LoKrConfig(
            r=config.rank,
            alpha=config.scale * config.rank,  # pyright: ignore[reportArgumentType]
            decompose_factor=config.factor,
            target_modules=targets,
        )
    else:
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.scale * config.rank,  # pyright: ignore[reportArgumentType]
            lora_dropout=dropout,
            target_modules=targets,
            bias="none",
        )
    transformer.add_adapter(settings, adapter_name=name)
    for parameters in parts(transformer, name=name).values():
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
    if config.kind == "lokr":
        lokr.put_on(transformer, targets)
    dora.put_on(transformer, magnitudes, name=name)


def parts(transformer: nn.Module, *, name: str = NAME) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of an adapter: kind of tensor -> module -> parameter, in model order."""
    pattern = re.compile(rf"(.+)\.({'|'.join(PARTS)})\.{re.escape(name)}(\.weight)?")
    found: dict[str, dict[str, nn.Parameter]] = {}
    for parameter_name, parameter in transformer.named_parameters():
        if match := pattern.fullmatch(parameter_name):
            found.setdefault(match[2], {})[match[1]] = parameter
    return found


@torch.no_grad()
def squared_norm(layer: nn.Module, *, name: str = NAME) -> Tensor | None:
    """Of a layer's update, a scalar on its device; None if it isn't an adapter's.

    LoRA's without magnitudes: |s B A|^2 = s^2 sum((B^T B) * (A A^T)), r x r numbers. The product
    itself, out x in numbers, is never made.
    """
    if isinstance(layer, lokr.KroneckerLinear):
        return layer.squared_norm(name)
    if isinstance(layer, LoraLayer):
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        assert isinstance(down, Tensor)
        assert isinstance(up, Tensor)
        return layer.scaling[name] ** 2 * torch.sum((up.T @ up) * (down @ down.T))
    return None
