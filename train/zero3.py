"""The frozen base in parts on each process by DeepSpeed's ZeRO-3, in place of FSDP2.

Owns the way into DeepSpeed and what of its settings is refused. Only its parameter partitioning is
used: the adapter, the optimizer and the sum of gradients stay Kindling's own, so that a run is the
same to the bit whatever shards its base. Each Linear is gathered by itself, the next ones ahead.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from peft.tuners.lora import LoraLayer
from torch import nn

from train.errors import ConfigError, MachineError

FILE = "accelerate launch --config_file configs/accelerate/deepspeed.yaml train.py ..."


def is_launched() -> bool:
    """Whether accelerate's launcher asks for DeepSpeed; on CPUs nothing else tells."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check() -> None:
    """Raises ConfigError for launcher settings that would go unheeded, MachineError without
    DeepSpeed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise MachineError(
            "accelerate is configured for DeepSpeed, which isn't installed: pip install deepspeed, "
            "or launch with configs/accelerate/fsdp2.yaml, which shards the base as well"
        )
    plugin = DeepSpeedPlugin()
    wrong = {
        "zero_stage": (plugin.zero_stage != 3, "3"),
        "zero3_init_flag": (plugin.zero3_init_flag, "false (it would cut the encoders, too)"),
        "offload_param_device": (plugin.offload_param_device != "none", "none"),
        "offload_optimizer_device": (plugin.offload_optimizer_device != "none", "none"),
        "gradient_clipping": (
            plugin.gradient_clipping != "auto",
            "nothing, and optim.max_grad_norm in the training config instead",
        ),
        "deepspeed_config_file": (
            os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none",
            "nothing: of DeepSpeed's own settings none counts",
        ),
    }
    if found := [f"{name} must be {right}" for name, (is_so, right) in wrong.items() if is_so]:
        raise ConfigError(f"accelerate's DeepSpeed settings: {'; '.join(found)}. Use {FILE}")


def shard(transformer: Any, device: torch.device) -> None:
    """Keep a part of each frozen weight on each process; adapters stay whole, on `device`.

    Weights go to the device one by one. All processes must call the model together from now on.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    settings = _settings(max(sum(p.numel() for p in b.parameters()) for b in blocks))
    with _without_adapters(transformer, device):
        deepspeed.zero.Init(module=transformer, config_dict_or_path=settings)
        engine, *_ = deepspeed.initialize(
            model=transformer, config=settings, dist_init_required=False
        )
    # It ends ZeRO's hooks when it goes, and as a Module must not become a part of the model.
    object.__setattr__(transformer, "_zero3", engine)


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """What this process keeps of a weight: all of it, unless ZeRO-3 has cut it."""
    return vars(weight).get("ds_tensor", weight)


def whole_size(weight: torch.Tensor) -> int:
    """Bytes of a weight on all processes together; its own are none between uses."""
    return vars(weight).get("ds_numel", weight.numel()) * weight.element_size()


def _settings(block: int) -> dict[str, Any]:
    """DeepSpeed's. block: numbers in the largest block. Nothing waits for a later use, and what is
    gathered ahead is bounded: by default 2 billion numbers would stay, half a base."""
    stage3 = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": block,
        "stage3_prefetch_bucket_size": block // 2,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,  # of an optimizer that there isn't
        "steps_per_print": float("inf"),
        "zero_optimization": {"stage": 3, **stage3},
    }


@contextmanager
def _without_adapters(transformer: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the low-rank branches are no parts of the model; they are moved to the device."""
    layers: list[Any] = [layer for layer in transformer.modules() if isinstance(layer, LoraLayer)]
    whole = [dict(layer._modules) for layer in layers]
    for layer in layers:
        for name in ("lora_A", "lora_B"):
            layer._modules.pop(name).to(device)
    try:
        yield
    finally:
        for layer, modules in zip(layers, whole, strict=True):
            layer._modules.clear()
            layer._modules.update(modules)
