"""DoRA's magnitudes: peft's layer, with row norms that don't need the whole changed weight.

DoRA (Liu et al. 2024): W' = m (W + s B A) / |W + s B A|, |.| the norm of each row, a constant to
the gradient. peft makes the changed weight in fp32 for it, twice the base's bytes, in each pass.
"""

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from train.adapters.updates import changed_squares, row_squares
from train.errors import ConfigError
from train.lora import base


class Magnitude(nn.Module):
    """In the place of peft's module of that name. weight: the magnitudes m, (out,), fp32.

    The base's own row norms are kept, so that m starts as exactly what it is divided by and the
    first picture is the base's.
    """

    squares: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("squares", row_squares(weight), persistent=False)
        self.weight = nn.Parameter(self.squares.sqrt())

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: nn.Linear,
        base_result: Tensor,
        adapter_name: str,
    ) -> Tensor:
        """What is added to `base_result`, the base's output: (..., out), in x's type."""
        with torch.no_grad():
            up, down = scaling * lora_B.weight.float(), lora_A.weight.float()
            norms = changed_squares(base_layer.weight, up, down, squares=self.squares).sqrt()
        factor = self.weight / norms.to(x.dtype)
        return (factor - 1) * base_result + factor * scaling * lora_B(lora_A(x))


@torch.no_grad()
def start(transformer: nn.Module, targets: list[str]) -> dict[str, Magnitude]:
    """The norms of the base's rows, by module.

    Raises ConfigError for a base whose weights can't be read, or with a row of zeros.
    """
    found = {}
    for name, weight in base.weights(transformer, targets):
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"lora.kind: dora starts from the norms of the base's rows, but {name} is kept as "
                f"{str(weight.dtype).removeprefix('torch.')}. Use a base in bf16, or lora."
            )
        found[name] = Magnitude(weight)
        if not weight.is_meta and not found[name].squares.all():
            raise ConfigError(
                f"lora.kind: dora scales rows of weights, but {name} has a row of zeros, which has "
                "no direction. Leave it out with lora.targets, or use lora."
            )
    return found


def put_on(transformer: nn.Module, magnitudes: dict[str, Magnitude], *, name: str) -> None:
    """Make DoRA of peft's LoRA layers: its own way there makes each changed weight whole."""
    for module, magnitude in magnitudes.items():
        layer: Any = transformer.get_submodule(module)
        layer.lora_magnitude_vector[name] = magnitude.to(layer.lora_A[name].weight.device)
        layer.lora_variant[name] = layer.resolve_lora_variant(config=LoraConfig(use_dora=True))
        layer.use_dora[name] = True
