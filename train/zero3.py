"""The frozen base in parts on each process by DeepSpeed's ZeRO-3, in place of FSDP2.

Owns the way into DeepSpeed and what of its settings is refused. Only its parameter partitioning is
used: the adapter, the optimizer and the sum of gradients stay Kindling's own, so that a run is the
same to the bit whatever shards its base. Each Linear is gathered by itself, the next ones ahead.
"""

import importlib.util
import logging
import os
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
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


def cut(module: nn.Module) -> None:
    """Leave this process its part of a block's weights, or of the model's, whose blocks are cut.

    Each weight becomes the first process's on the way, so all processes must come in the same
    order.
    """
    import deepspeed
    from diffusers import ModelMixin

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformer: Any = module if isinstance(module, ModelMixin) else None
    blocks = [module]
    if transformer is not None:
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    settings = _settings(max(sum(map(_whole_count, block.parameters())) for block in blocks))
    deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    if transformer is not None:
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
    return _whole_count(weight) * weight.element_size()


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight itself, or a copy put together of the parts on all processes, which must all ask."""
    if "ds_tensor" not in vars(weight):
        return weight
    import deepspeed

    with deepspeed.zero.GatheredParameters(weight):
        return weight.detach().clone()


def _whole_count(weight: torch.Tensor) -> int:
    return vars(weight).get("ds_numel", weight.numel())


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
