"""Adapter files with known updates, for the operations' proofs."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from train.adapters.source import Source
from train.adapters.updates import LowRank
from train.loading.names import Shape, diffusers_places

SHAPE = Shape(width=16, double=2, single=2)
State = dict[str, Tensor]


def random_lora(seed: int, *, rank: int = 4, dtype: torch.dtype = torch.float32) -> State:
    """All Linears in the blocks, diffusers' names."""
    draw, state = torch.Generator().manual_seed(seed), {}
    for module, place in diffusers_places(SHAPE).items():
        down = torch.randn(rank, place.columns, generator=draw)
        up = torch.randn(place.stop - place.start, rank, generator=draw)
        state[f"transformer.{module}.lora_A.weight"] = down.to(dtype)
        state[f"transformer.{module}.lora_B.weight"] = up.to(dtype)
    return state


def save(state: State, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata=metadata)
    return path


def deltas(path: Path) -> dict[str, Tensor]:
    """The full change of each of diffusers' weights that a file means, fp64."""
    found = {}
    for _, group in Source(path).walk():
        for module, update in group.items():
            assert isinstance(update, LowRank)
            up, down = update.factors()
            found[module] = up @ down
    return found
