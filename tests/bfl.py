"""Single files as ComfyUI ships them, of a small model: BFL's names, plain or scaled fp8."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from train.loading import names

FP8 = torch.float8_e4m3fn
BLOCKS = ("double_blocks.", "single_blocks.")


def tensors(transformer: Any) -> dict[str, Tensor]:
    """A diffusers transformer's weights in BFL's names and layout."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    weights = transformer.state_dict()
    for name, home in names.bfl_homes(dict(transformer.config)).items():
        weight = weights[name]
        if home.swapped:
            first, second = weight.chunk(2)
            weight = torch.cat([second, first])
        parts.setdefault(home.key, []).append((home.rows[0] if home.rows else 0, weight))
    return {
        key: torch.cat([part for _, part in sorted(these, key=lambda pair: pair[0])])
        for key, these in parts.items()
    }


def scaled(weights: dict[str, Tensor], *, ending: str = ".weight_scale") -> dict[str, Tensor]:
    """The blocks' Linears in fp8 with one scale each, as ComfyUI's scaled files have them."""
    found = {}
    for key, weight in weights.items():
        if key.startswith(BLOCKS) and weight.ndim == 2:
            scale = weight.abs().max().float() / 448
            found[key] = (weight / scale).clamp(-448, 448).to(FP8)
            found[key.removesuffix(".weight") + ending] = scale
        else:
            found[key] = weight
    return found


def newer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As newer versions of ComfyUI write them: a note on each Linear, and an input scale."""
    found = dict(weights)
    note = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": False}).encode()
    for key in weights:
        if key.endswith(".weight_scale"):
            stem = key.removesuffix(".weight_scale")
            found[f"{stem}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
            found[f"{stem}.input_scale"] = torch.tensor(1.0)
    return found


def save(weights: dict[str, Tensor], path: Path, *, prefix: str = "", **metadata: str) -> Path:
    """As a file, each key behind a prefix."""
    copies = {prefix + key: weight.contiguous().clone() for key, weight in weights.items()}
    save_file(copies, path, metadata=metadata)
    return path
