"""PiSSA's start, the main directions of weights, and the frozen adapter that takes it off again.

peft takes the start off the base's weights, which rounds them; here the base stays as it is.
"""

import warnings
from typing import Any

import torch
from torch import nn

from train.config import LoraConfig
from train.errors import ConfigError
from train.lora import layers
from train.lora.base import whole

START_NAME = "start"
"""The frozen adapter."""

ITERATIONS = 4
"""Of the randomised SVD, as peft's `pissa_niter_4`; a whole SVD would take hours on dev."""


def add_start(transformer: Any, lora: LoraConfig, targets: list[str]) -> None:
    """A second adapter, active beside the first one, and frozen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        layers.add(transformer, lora, targets, name=START_NAME)
    transformer.set_adapters([layers.NAME, START_NAME])
    for parameter in start_parameters(transformer):
        parameter.requires_grad_(False)


def start_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """Those of the frozen adapter."""
    parts = layers.parts(transformer, name=START_NAME).values()
    return [parameter for of_modules in parts for parameter in of_modules.values()]


@torch.no_grad()
def start_from_base(transformer: Any, targets: list[str], *, scale: float) -> None:
    """PiSSA (Meng et al. 2024): W = U S V; down and up are sqrt(S / scale) times V and U, cut to
    the rank. Their product is taken off by the second adapter, which has -up.

    Raises ConfigError where the base has no weights to start from.
    """
    for name in targets:
        module = transformer.get_submodule(name)
        weight = whole(module.base_layer.weight)
        down, up = module.lora_A, module.lora_B
        rank = down[layers.NAME].out_features
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"lora.init: pissa starts from the base's weights, but {name} is kept as "
                f"{str(weight.dtype).removeprefix('torch.')}. Remove it, or use a base in bf16."
            )
        if rank > min(weight.shape):
            raise ConfigError(
                f"lora.rank: {rank} is more than the {min(weight.shape)} directions that pissa "
                f"finds in {name}. Lower it, or remove lora.init."
            )
        left, sizes, right = torch.svd_lowrank(weight.float(), rank, niter=ITERATIONS)
        root = (sizes / scale).sqrt()
        for adapter, sign in ((layers.NAME, 1), (START_NAME, -1)):
            down[adapter].weight.copy_(root[:, None] * right.T)
            up[adapter].weight.copy_(sign * left * root)
