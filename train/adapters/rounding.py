"""What merging an adapter into stored weights loses, measured on a base's real weights.

With Q the storing of a weight, the adapter's effect after merging is Q(W + D) - Q(W); lost is
|Q(W + D) - Q(W) - D| / |D|. W is as the base has it, so an unmerged adapter loses none of this.
Owns the measure and its sample of rows; the formats are `frozen`'s.
"""

from pathlib import Path

import torch
from torch import Tensor

from train.adapters.skeleton import settings_of
from train.adapters.source import Source
from train.adapters.updates import LowRank
from train.loading import frozen, names, weights

ROWS = 64
"""Sampled of each weight, evenly: enough for a figure of two digits over all Linears."""

FORMATS = ("bf16", "fp8", "nf4")


def measure(source: Source, base: Path) -> dict[str, float]:
    """Format -> share of the adapter's norm that merging into it loses.

    base: a diffusers folder with weights, of the adapter's shape. LoRA only; empty where the
    folder has no weights or the file no LoRA in the blocks. Raises ConfigError for damaged weights.
    """
    folder = base / "transformer" if (base / "transformer").is_dir() else base
    if not list(folder.glob("*.safetensors")):
        return {}
    pieces = weights.open_folder(folder, settings_of(base)).pieces
    inside = names.diffusers_places(source.shape)
    lost, norm = dict.fromkeys(FORMATS, 0.0), 0.0
    for _, group in source.walk():
        for module, update in group.items():
            if module not in inside or not isinstance(update, LowRank):
                continue
            weight = pieces[f"{module}.weight"].read().dense(torch.bfloat16)
            rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).long()
            up, down = update.up[rows].float(), update.down.float()
            delta, sample = update.scale * up @ down, weight[rows].float()
            norm += delta.double().square().sum().item()
            for kind in FORMATS:
                effect = _stored(sample + delta, kind) - _stored(sample, kind)
                lost[kind] += (effect - delta).double().square().sum().item()
    return {kind: (value / norm) ** 0.5 for kind, value in lost.items()} if norm else {}


def _stored(weight: Tensor, kind: str) -> Tensor:
    """A weight as it comes back from a format, fp32."""
    if kind == "bf16":
        return weight.bfloat16().float()
    return frozen.dequantize(frozen.quantize(weight, kind), kind, shape=weight.shape)
